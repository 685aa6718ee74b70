"""A family's VAE without memory: its parameters, and the activations of decoding."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixgrpo.models.family import Family
from mixgrpo.planning.meter import LikeGpu, Meter
from mixgrpo.planning.settings import Model, cannot_be, family_for, make_part, settings_of

# A convolution's working memory, in multiples of the largest feature map; an assumption.
_WORKSPACE = 2


class Decoder:
    """A family's VAE.

    Attributes:
        parameters: number of parameters, of the encoder too.

    Raises:
        ValueError: the settings are not those of such a VAE.
    """

    def __init__(self, family: Family, settings: Mapping[str, Any]) -> None:
        self.family = family
        self._vae = make_part(family, "vae", settings)
        self.parameters = sum(map(Tensor.numel, self._vae.parameters()))

    @functools.cache  # noqa: B019 there are few, and they live as long as the process
    def activations(self, height: int, width: int, channels: int, compute: str) -> int:
        """Bytes that are alive in decoding one image with weights of this dtype.

        Args:
            channels: of a latent token.

        Raises:
            ValueError: the VAE cannot decode an image of this size.
        """
        family, vae = self.family, nn.Module.to(self._vae, getattr(torch, compute))
        names = ("transformer", "scheduler", *family.text_parts)
        pipeline = family.pipeline(vae=vae, **dict.fromkeys(names))
        meter = Meter(vae)
        latents = torch.empty(1, family.tokens(height, width), channels, device="meta")
        try:
            with torch.no_grad(), LikeGpu(torch.float32), meter:  # whose attention is fused
                family.decode(pipeline, latents, height, width)
        except Exception as error:  # whatever a library raises for settings that do not fit
            raise cannot_be("vae", error) from error
        return meter.peak + _WORKSPACE * meter.largest


def decoder_of(model: Model) -> Decoder:
    """The VAE of a model folder, or the published one of the family if there is none.

    Raises:
        OSError, ValueError: the family is not known, or the configuration cannot be used.
    """
    settings = json.dumps(settings_of(model, "vae"), sort_keys=True)
    return _decoder(family_for(model), settings)


@functools.cache
def _decoder(family: Family, settings: str) -> Decoder:
    return Decoder(family, json.loads(settings))
