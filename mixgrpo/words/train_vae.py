"""Trains the small autoencoder and measures the mean and deviation of its latents by channel."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn
from torch.nn import functional as F

from mixgrpo.shapes.fitting import fit
from mixgrpo.words.renderer import PALETTE, render
from mixgrpo.words.signs import Sign, draw, split

BATCH = 8
# The rims of letters carry the word; unweighted, they are learnt long after the plain ground.
LETTER_WEIGHT = 3.0
KL_WEIGHT = 1e-3


def training_pictures(count: int, seed: int) -> tuple[Tensor, list[Sign]]:
    """Pictures [count, 3, 32, 64] in [0, 1] of signs with training words."""
    rng = random.Random(seed)
    signs = draw(split(test=False), count, rng)
    return torch.stack([render(sign, rng) for sign in signs]), signs


def train_vae(vae: AutoencoderKLQwenImage, steps: int, seed: int, pictures: int = 8192) -> None:
    """Fits ``vae`` in place: L1 reconstruction plus a weak KL.

    Afterwards its configuration holds the mean and the standard deviation of each channel of its
    latents, by which the pipeline normalises them.
    """
    images, signs = training_pictures(pictures, seed)
    grounds = torch.tensor([PALETTE[sign.ground] for sign in signs])[:, :, None, None]
    weights = 1 + LETTER_WEIGHT * ((images - grounds).abs().amax(1, keepdim=True) > 0.02)
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(pictures, (BATCH,), generator=generator)
        batch = images[chosen] * 2 - 1
        mean, log_variance = _moments(vae, batch)
        deviation = (log_variance / 2).exp()
        noise = torch.randn(mean.shape, generator=generator)
        difference = (decode(vae, mean + deviation * noise) - batch).abs()
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        return (difference * weights[chosen]).mean() + KL_WEIGHT * kl

    with flat(vae):
        fit(vae, loss, steps, 2e-3, "vae", decay=0.0)
        latents = encode(vae, images[:1024])
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3)).tolist(), latents_std=latents.std((0, 2, 3)).tolist()
    )


def _moments(vae: AutoencoderKLQwenImage, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [N, 16, 4, 8] of the latents of images in [-1, 1]."""
    mean, log_variance = vae.quant_conv(vae.encoder(images[:, :, None]))[:, :, 0].chunk(2, 1)
    return mean, log_variance.clamp(-30, 20)


def decode(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Latents [N, 16, h, w], not normalised -> images [N, 3, 8h, 8w], in [-1, 1] but for errors."""
    return vae.decoder(vae.post_quant_conv(latents[:, :, None]))[:, :, 0]


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, images: Tensor, batch: int = 64) -> Tensor:
    """The means [N, 16, h, w] of the latents of images [N, 3, 8h, 8w] in [0, 1], not normalised."""
    return torch.cat([_moments(vae, part * 2 - 1)[0] for part in images.split(batch)])


@contextmanager
def flat(vae: AutoencoderKLQwenImage) -> Iterator[None]:
    """Runs the causal 3D convolutions of single pictures as the 2D ones that they amount to.

    Before the first frame there are only zeros, so of each kernel the last slice in time alone
    counts. That halves the time.
    """
    convolutions = [
        module
        for name, module in vae.named_modules()
        if isinstance(module, nn.Conv3d) and not name.endswith("time_conv")
    ]
    for module in convolutions:
        module.forward = partial(_convolve, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in convolutions:
            del module.forward


def _convolve(module: nn.Conv3d, x: Tensor, cache: None = None) -> Tensor:
    """One frame [N, C, 1, H, W] through the last slice of a kernel, with square padding."""
    side = module.kernel_size[-1] // 2
    return F.conv2d(x[:, :, 0], module.weight[:, :, -1], module.bias, padding=side)[:, :, None]
