"""The registry of model families: their policies, text encoders and exporters by name."""

from __future__ import annotations

import importlib
from typing import Any


class _OnDemand(dict[str, Any]):
    """Name -> what is at ``module:name``, imported when it is asked for: it takes seconds, and
    commands that load no model do without."""

    def __init__(self, **places: str) -> None:
        super().__init__()
        self._places = places

    def __missing__(self, family: str) -> Any:
        module, _, name = self._places[family].partition(":")
        return getattr(importlib.import_module(module), name)


FAMILIES = _OnDemand(flux="mixgrpo.models.flux:Flux")
ENCODERS = _OnDemand(flux="mixgrpo.models.flux_text:FluxText")
EXPORTERS = _OnDemand(flux="mixgrpo.models.flux_export:export_flux")
