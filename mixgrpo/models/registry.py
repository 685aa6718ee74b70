"""The model families by name: how each is loaded, how it encodes text, how it is exported."""

from __future__ import annotations

from mixgrpo.models.flux import Flux
from mixgrpo.models.flux_export import export_flux
from mixgrpo.models.flux_text import FluxText

FAMILIES = {"flux": Flux}
ENCODERS = {"flux": FluxText}
EXPORTERS = {"flux": export_flux}
