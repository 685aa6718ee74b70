"""Policies small enough for thousands of evaluations, and what a rollout needs beside them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mixgrpo.config import ModelConfig
from mixgrpo.engines.data_parallel import DataParallel
from mixgrpo.maths.dpm_solver import make_solver
from mixgrpo.maths.schedule import flash_sigmas
from mixgrpo.maths.transitions import make_transition
from mixgrpo.models.flux import FLUX
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.noise import Noise
from mixgrpo.rollout import SamplingPlan
from mixgrpo.shapes.architecture import TEXT_LENGTH, flux_pipeline
from mixgrpo.types import TextEmbedding, Velocity, Window

CPU = torch.device("cpu")
SHAPE = (3, 4)  # S tokens, C channels
TOKEN_WIDTH, POOLED_WIDTH = 3, 2
SHIFT = 3.0
ETA = 0.7


class SmallNet(nn.Module):
    """A smooth velocity in which every token sees its own channels, all tokens, sigma and text."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.hidden = nn.Linear(2 * SHAPE[1] + 1 + TOKEN_WIDTH + POOLED_WIDTH, 16)
            self.out = nn.Linear(16, SHAPE[1])

    def forward(self, x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        context = torch.cat([x.mean(1), sigma[:, None], text.tokens.mean(1), text.pooled], 1)
        context = context[:, None].expand(-1, x.shape[1], -1)  # [N, S, C + 1 + text]
        return self.out(torch.tanh(self.hidden(torch.cat([x, context], -1))))


class Counted:
    """A velocity that remembers how many samples, at which sigmas, it was evaluated for."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.batches: list[int] = []
        self.sigmas: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        assert len(x) == len(sigma) == len(text)
        self.batches.append(len(x))
        self.sigmas += sigma.tolist()
        return self.velocity(x, sigma, text)

    @property
    def evaluations(self) -> int:
        return sum(self.batches)


class Recording(DataParallel):
    """An engine that keeps the gradient of every optimizer step; at lr 0 it changes no weight."""

    def __init__(self, module: nn.Module, lr: float = 0.0, device: torch.device = CPU) -> None:
        super().__init__(module, device, partial(constant_sgd, lr=lr))
        self.gradients: list[Tensor] = []

    def step(self) -> None:
        self.gradients.append(gradient_of(self.parameters))
        super().step()


def constant_sgd(parameters: list[nn.Parameter], lr: float) -> tuple[Optimizer, LambdaLR]:
    optimizer = SGD(parameters, lr=lr)
    return optimizer, LambdaLR(optimizer, lambda _: 1.0)


def gradient_of(parameters: Sequence[nn.Parameter]) -> Tensor:
    """All gradients as one vector; a weight without one counts as zero."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([grad.flatten() for grad in grads]).clone()


def perturbed(module: nn.Module, scale: float, seed: int = 1) -> nn.Module:
    """Adds normal noise to every weight, in place; it is drawn on the CPU, wherever they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((scale * noise).to(parameter.device))
    return module


@functools.cache
def tiny_flux() -> DiffusersPolicy:
    """The real FLUX classes, untrained, 64x64 pictures: 16 latent tokens. Treat as read-only."""
    config = ModelConfig(
        height=64,
        width=64,
        text_length=TEXT_LENGTH,
        compute_dtype="float32",
        gradient_checkpointing=False,
    )
    return DiffusersPolicy(FLUX, flux_pipeline(), config, CPU)


def small_text(prompts: int, seed: int = 2) -> TextEmbedding:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(prompts, 5, TOKEN_WIDTH, generator=generator)
    return TextEmbedding(tokens, torch.randn(prompts, POOLED_WIDTH, generator=generator))


def small_plan(
    steps: int = 8,
    start: int = 3,
    size: int = 2,
    solver: str = "euler",
    order: int = 2,
    ratio: float = 1.0,
    transition: str = "flow_sde",
    eta: float = ETA,
) -> SamplingPlan:
    window = Window(start, start + size)
    sigmas = flash_sigmas(steps, SHIFT, window, ratio)
    return SamplingPlan(
        sigmas=sigmas,
        window=window,
        transition=make_transition(transition, eta),
        solver=partial(make_solver, solver, sigmas, order),
    )


def small_noise(
    prompts: Sequence[int] = (0, 1),
    samples: int = 3,
    shared: bool = True,
    seed: int = 5,
    iteration: int = 0,
    shape: tuple[int, int] = SHAPE,
) -> Noise:
    return Noise(seed, iteration, prompts, samples, shape, shared, CPU)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())
