"""Sampling at FLUX.1-dev's size with random weights: seconds per evaluation, share of the peak.

python scripts/benchmark/sampling.py                       # a GPU: 720x720 and 1024x1024, 25 steps
python scripts/benchmark/sampling.py --compile --batch 3
python scripts/benchmark/sampling.py --small --device cpu  # a small transformer, anywhere
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from environment import environment
from torch.utils.flop_counter import FlopCounterMode

from mixgrpo.config import ModelConfig
from mixgrpo.maths.schedule import make_sigmas
from mixgrpo.models.flux import Flux
from mixgrpo.noise import Noise
from mixgrpo.rollout import sample_ode
from mixgrpo.types import TextEmbedding

TEXT_LENGTH = 512
SHIFT = 3.0
# What differs from diffusers' defaults in FLUX.1-dev's published configurations.
TRANSFORMER = {"guidance_embeds": True}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
SMALL_TRANSFORMER = {
    **TRANSFORMER,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [8, 12, 12],
}
SMALL_VAE = {**VAE, "block_out_channels": [16, 16, 16, 16], "norm_num_groups": 8}
# Dense bfloat16 TFLOP/s, from the makers' data sheets, by a part of the device's name.
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "B200": 2250}


@dataclass(frozen=True)
class Speed:
    """Results for one size: median seconds, and the counted TFLOP per image and evaluation."""

    size: int
    batch: int
    tflop: float
    evaluation: float
    sampling: float
    decoding: float
    memory_gib: float

    @property
    def tflops(self) -> float:
        return self.batch * self.tflop / self.evaluation


def build(chosen: argparse.Namespace, size: int) -> Flux:
    """The policy, with weights drawn on the device in their dtype: the CPU never holds them."""
    knobs = ModelConfig(
        compute_dtype=chosen.dtype, height=size, width=size, text_length=TEXT_LENGTH
    )
    transformer = SMALL_TRANSFORMER if chosen.small else TRANSFORMER
    dtype, before = getattr(torch, chosen.dtype), torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(chosen.device):
            parts = {
                "transformer": FluxTransformer2DModel(**transformer),
                "vae": AutoencoderKL(**(SMALL_VAE if chosen.small else VAE)),
            }
    finally:
        torch.set_default_dtype(before)
    for part in parts.values():
        part.eval().requires_grad_(False)
    if chosen.attention:
        parts["transformer"].set_attention_backend(chosen.attention)
    if chosen.compile:
        parts["transformer"].compile_repeated_blocks(fullgraph=True)
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = FluxPipeline(**parts, **dict.fromkeys(names), scheduler=scheduler)
    return Flux(pipeline, knobs, torch.device(chosen.device), text=NoText())


class NoText:
    """Replaces the text encoders: the embeddings here are random."""


def text_for(policy: Flux, batch: int, device: torch.device) -> TextEmbedding:
    config = policy.pipeline.transformer.config
    tokens = torch.randn(batch, TEXT_LENGTH, config.joint_attention_dim, device=device)
    pooled = torch.randn(batch, config.pooled_projection_dim, device=device)
    return TextEmbedding(tokens.to(policy.compute_dtype), pooled.to(policy.compute_dtype))


def count_tflop(small: bool, tokens: int) -> float:
    """TFLOP of one evaluation for one image, counted on the meta device without computation."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**(SMALL_TRANSFORMER if small else TRANSFORMER))
        config = model.config
        with FlopCounterMode(display=False) as counter:
            model(
                hidden_states=torch.empty(1, tokens, config.in_channels),
                timestep=torch.empty(1),
                guidance=torch.empty(1),
                pooled_projections=torch.empty(1, config.pooled_projection_dim),
                encoder_hidden_states=torch.empty(1, TEXT_LENGTH, config.joint_attention_dim),
                txt_ids=torch.empty(TEXT_LENGTH, 3),
                img_ids=torch.empty(tokens, 3),
            )
    return counter.get_total_flops() / 1e12


@torch.no_grad()
def measure(chosen: argparse.Namespace, size: int) -> Speed:
    """Measures whole samplings from noise to images; the first warms up and is not counted."""
    device = torch.device(chosen.device)
    policy = build(chosen, size)
    text = text_for(policy, chosen.batch, device)
    noise = Noise(
        seed=0, iteration=0, prompts=range(chosen.batch), samples=1,
        shape=policy.latent_shape, shared=True, device=device,
    )  # fmt: skip
    velocity, sigmas = policy.velocity(policy.module), make_sigmas(chosen.steps, SHIFT)
    sampling, decoding = [], []
    for _ in range(chosen.repeats + 1):
        start = _now(device)
        latents = sample_ode(velocity, noise.initial(), text, sigmas, chosen.batch)
        middle = _now(device)
        policy.decode(latents)
        sampling.append(middle - start)
        decoding.append(_now(device) - middle)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    seconds = median(sampling[1:])
    return Speed(
        size=size,
        batch=chosen.batch,
        tflop=count_tflop(chosen.small, policy.latent_shape[0]),
        evaluation=seconds / chosen.steps,
        sampling=seconds,
        decoding=median(decoding[1:]),
        memory_gib=peak,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def peak_of(chosen: argparse.Namespace) -> float | None:
    """The device's peak TFLOP/s, if known."""
    if chosen.peak or torch.device(chosen.device).type != "cuda":
        return chosen.peak
    name = torch.cuda.get_device_name(chosen.device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[720, 1024], help="height and width of images")
    add("--batch", type=int, default=1, help="images per evaluation")
    add("--steps", type=int, default=25)
    add("--repeats", type=int, default=3, help="timed samplings; the median is reported")
    add("--compile", action="store_true", help="compile the transformer's repeated blocks")
    add("--attention", help="one of diffusers' attention backends; default: torch's choice")
    add("--small", action="store_true", help="use a small transformer")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--peak", type=float, help="the device's bfloat16 TFLOP/s, if not known here")
    add("--json", type=Path, help="also write the results to this file")
    chosen = parser.parse_args(arguments)
    if min(chosen.batch, chosen.steps, chosen.repeats) < 1:
        parser.error("--batch, --steps and --repeats must be at least 1")
    if any(size % 16 for size in chosen.sizes):
        parser.error(f"--sizes must be multiples of 16, got {chosen.sizes}")
    if torch.device(chosen.device).type == "cpu" and not chosen.small:
        parser.error("FLUX.1-dev's size needs a GPU with 40 GB; without one, use --small")
    return chosen


HEADS = ("size", "batch", "TFLOP", "s/evaluation", "TFLOP/s", "of peak", "sampling", "decoding")
ROW = "{:>6} {:>6} {:>8} {:>13} {:>9} {:>8} {:>10} {:>10} {:>12}"


def row(found: Speed, peak: float | None) -> str:
    share = f"{100 * found.tflops / peak:.0f}%" if peak else "-"
    memory = f"{found.memory_gib:.1f} GiB" if found.memory_gib else "-"
    return ROW.format(
        *(found.size, found.batch, f"{found.tflop:.3g}", f"{found.evaluation:.3f}"),
        *(f"{found.tflops:.3g}", share, f"{found.sampling:.2f} s", f"{found.decoding:.2f} s"),
        memory,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    about, peak = environment(torch.device(chosen.device)), peak_of(chosen)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    kind = "a small transformer" if chosen.small else "FLUX.1-dev's size"
    how = ", blocks compiled" if chosen.compile else ""
    print(f"task: {chosen.steps} steps, {kind}, random weights, {chosen.dtype}{how}\n")
    print(ROW.format(*HEADS, "peak memory"))
    results = []
    for size in chosen.sizes:
        found = measure(chosen, size)
        print(row(found, peak), flush=True)
        share = found.tflops / peak if peak else None
        results.append({**asdict(found), "tflops": found.tflops, "share_of_peak": share})
        if torch.device(chosen.device).type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if chosen.json:
        chosen.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
