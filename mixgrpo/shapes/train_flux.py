"""Pretrains the small FLUX and its text encoders on rendered images by conditional flow matching.

Like the captions of web data, some of the captions are wrong in one fact. The base model therefore
draws clean images that do not always follow the text, which preference training improves.
"""

from __future__ import annotations

import random

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from mixgrpo.maths.schedule import shift_time
from mixgrpo.shapes.architecture import TEXT_LENGTH
from mixgrpo.shapes.data import training_pictures
from mixgrpo.shapes.fitting import fit
from mixgrpo.shapes.scenes import Scene, alter
from mixgrpo.shapes.train_vae import encode

BATCH = 64
GUIDANCE = 3.5
# The content of an image is determined above sigma 0.8, where a time shift of 1 rarely trains.
SHIFT = 2.0


def train_flux(
    pipeline: FluxPipeline,
    steps: int,
    seed: int,
    pictures: int,
    play: float,
    wrong_captions: float,
) -> None:
    """Fits the transformer and both text encoders in place; the VAE is used as it is.

    Args:
        play: how much sizes and places vary in the images, 0 to 1.
        wrong_captions: fraction of captions with one fact altered.
    """
    images, scenes = training_pictures(pictures, seed, play)
    latents = pack(pipeline, encode(pipeline.vae, images))
    rng = random.Random(seed)
    true_ids = tokenize(pipeline, scenes)
    wrong_ids = tokenize(pipeline, [alter(scene, rng) for scene in scenes])
    model = nn.ModuleDict(
        {
            "transformer": pipeline.transformer,
            "clip": pipeline.text_encoder,
            "t5": pipeline.text_encoder_2,
        }
    )
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(pictures, (BATCH,), generator=generator)
        wrong = (torch.rand(BATCH, generator=generator) < wrong_captions)[:, None]
        clip_ids, t5_ids = (
            torch.where(wrong, altered[chosen], true[chosen])
            for true, altered in zip(true_ids, wrong_ids, strict=True)
        )
        return _loss(model, latents[chosen], clip_ids, t5_ids, generator)

    fit(model, loss, steps, 1.5e-3, "flux", decay=1e-3, average=True)


def _loss(
    model: nn.ModuleDict, x0: Tensor, clip_ids: Tensor, t5_ids: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity x1 - x0 at noise levels that favour high noise."""
    x1 = torch.randn(x0.shape, generator=generator)
    sigma = shift_time(torch.rand(len(x0), generator=generator), SHIFT)
    at = sigma[:, None, None]
    predicted = model["transformer"](
        hidden_states=(1 - at) * x0 + at * x1,
        timestep=sigma,
        guidance=torch.full_like(sigma, GUIDANCE),
        pooled_projections=model["clip"](clip_ids).pooler_output,
        encoder_hidden_states=model["t5"](t5_ids).last_hidden_state,
        txt_ids=torch.zeros(TEXT_LENGTH, 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, 4, 4, x0.device, x0.dtype),
        return_dict=False,
    )[0]
    return (predicted - (x1 - x0)).square().mean()


def tokenize(pipeline: FluxPipeline, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """CLIP and T5 token ids, each [N, TEXT_LENGTH], padded as the FLUX pipeline pads."""
    captions = [scene.caption for scene in scenes]
    clip, t5 = (
        tokenizer(
            captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
        ).input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    )
    return clip, t5


def pack(pipeline: FluxPipeline, latents: Tensor) -> Tensor:
    """VAE latents [N, 16, 8, 8] -> normalised tokens [N, 16, 64]."""
    config = pipeline.vae.config
    scaled = (latents - config.shift_factor) * config.scaling_factor
    return FluxPipeline._pack_latents(scaled, *scaled.shape)
