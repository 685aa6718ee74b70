"""Trains the small autoencoder and measures the shift and scale of its latents."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mixgrpo.shapes.data import training_pictures
from mixgrpo.shapes.fitting import fit

BATCH = 8
# Shapes cover a tenth of an image; unweighted, their colours are learnt long after the background.
SHAPE_WEIGHT = 4.0


def train_vae(vae: AutoencoderKL, steps: int, seed: int, pictures: int = 8192) -> None:
    """Fits ``vae`` in place: L1 reconstruction plus a weak KL, cosine learning rate.

    Afterwards its configuration holds the shift (mean) and scale (1/std) that normalise its latents
    to mean 0 and standard deviation 1, as FLUX's does.
    """
    images, _ = training_pictures(pictures, seed)
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        batch = images[torch.randint(pictures, (BATCH,), generator=generator)] * 2 - 1
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        return _weighted_l1(decoded, batch) + 1e-5 * posterior.kl().mean() / 1024

    fit(vae, loss, steps, 2e-3, "vae", decay=1e-4)
    latents = encode(vae, images[:1024])
    vae.register_to_config(
        shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item()
    )


def _weighted_l1(decoded: Tensor, images: Tensor) -> Tensor:
    background = images[:, :, :1, :1]  # no shape reaches the corner
    shape = (images - background).abs().amax(1, keepdim=True) > 0.1
    return ((decoded - images).abs() * (1 + SHAPE_WEIGHT * shape)).mean()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, batch: int = 64) -> Tensor:
    """The means [N, 16, 8, 8] of the latents of images [N, 3, 64, 64] in [0, 1], unscaled."""
    return torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(batch)])
