"""One MixGRPO iteration at FLUX.1-dev's size on a GPU: seconds by phase, memory, share of the peak.

python scripts/benchmark/flux_iteration.py                          # LoRA; the published way too
python scripts/benchmark/flux_iteration.py --train full             # 8-bit AdamW, bfloat16 weights
python scripts/benchmark/flux_iteration.py --variants MixGRPO --compile off inductor
python scripts/benchmark/flux_iteration.py --variants MixGRPO --attention native _native_cudnn
python scripts/benchmark/flux_iteration.py --samples 4 --iterations 1   # shorter
python scripts/benchmark/flux_iteration.py --small --device cpu     # a small transformer, anywhere

The weights are random, because time and memory do not depend on them. The published way is that of
speed.py: one image at a time, nothing shared, all T+1 latents kept, one sample per backward pass;
it runs in the same process, on the same model. Each choice of --compile and --attention is measured
on a separate model. Text encoders and rewards are left out. On an H100, a call with the defaults
should end within 10 minutes; --variants, --samples and --iterations select parts of it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from environment import environment
from sampling import (
    SMALL_TRANSFORMER,
    SMALL_VAE,
    TEXT_LENGTH,
    TRANSFORMER,
    VAE,
    NoText,
    peak_of,
    text_for,
)
from speed import (
    VARIANTS,
    Measurement,
    Task,
    add_task_options,
    frozen_adamw,
    measure,
    task_complaints,
)
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mixgrpo.config import ModelConfig
from mixgrpo.engines.adamw import FrugalAdamW
from mixgrpo.models.flux import Flux, speed_up, trained_dtype
from mixgrpo.planning.flux_size import FluxSize
from mixgrpo.planning.operations import operations_per_picture
from mixgrpo.types import Window

GIB = 2**30


@dataclass(frozen=True)
class Result:
    """One variant: its knobs, seconds by phase, evaluations per picture, and what follows.

    Attributes:
        tflops: TFLOP/s over the whole iteration, decoding's time included, its work not.
        memory_gib: peak of allocated tensors, the model included; NaN where it is not known.
    """

    variant: str
    compile: str
    attention: str
    seconds: dict[str, float]
    evaluations: dict[str, float]
    tflops: float
    memory_gib: float


def frugal(parameters: list[nn.Parameter]) -> tuple[Optimizer, LambdaLR]:
    """8-bit AdamW's work, without an effect."""
    optimizer = FrugalAdamW(parameters, 0.0, (0.9, 0.999), 0.0, eight_bit=True, seed=0)
    return optimizer, LambdaLR(optimizer, lambda _: 1.0)


def knobs_for(chosen: argparse.Namespace, compile_by: str, attention: str) -> ModelConfig:
    return ModelConfig(
        train=chosen.train,
        weights=chosen.weights,
        compute_dtype=chosen.dtype,
        height=chosen.size,
        width=chosen.size,
        text_length=TEXT_LENGTH,
        gradient_checkpointing=not chosen.keep_activations,
        compile=compile_by,  # type: ignore[arg-type]
        attention=attention,  # type: ignore[arg-type]
    )


def build(chosen: argparse.Namespace, knobs: ModelConfig) -> Flux:
    """The policy, its weights drawn where and as they are trained: the CPU never holds them."""
    compute, before = getattr(torch, knobs.compute_dtype), torch.get_default_dtype()
    stored = trained_dtype(knobs) if knobs.train == "full" else compute
    torch.manual_seed(0)
    try:
        with torch.device(chosen.device):
            torch.set_default_dtype(stored)
            transformer = FluxTransformer2DModel(**transformer_config(chosen))
            torch.set_default_dtype(compute)
            vae = AutoencoderKL(**(SMALL_VAE if chosen.small else VAE))
    finally:
        torch.set_default_dtype(before)
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipeline = FluxPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(names),
    )
    policy = Flux(pipeline, knobs, torch.device(chosen.device), text=NoText())
    policy._make_trainable(seed=0)
    speed_up(policy.module, knobs)
    return policy


def transformer_config(chosen: argparse.Namespace) -> dict[str, object]:
    return SMALL_TRANSFORMER if chosen.small else TRANSFORMER


def make_task(chosen: argparse.Namespace, policy: Flux) -> Task:
    text = text_for(policy, chosen.prompts, policy.device)
    count = chosen.prompts * chosen.samples
    advantages = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return Task(
        policy=policy,
        text=text,
        samples=chosen.samples,
        steps=chosen.steps,
        window=Window(chosen.start, chosen.start + chosen.window),
        optimizer_steps=chosen.optimizer_steps,
        advantages=advantages.to(policy.device),
        micro_batch=chosen.micro_batch,
        seed=0,
        optimizer=frugal if chosen.optimizer == "adamw_8bit" else frozen_adamw,
    )


def results(chosen: argparse.Namespace) -> Iterator[Result]:
    """Every variant with every choice of compiler and attention; the published way just once."""
    choices = list(itertools.product(chosen.compile, chosen.attention))
    for compile_by, attention in choices:
        task = make_task(chosen, build(chosen, knobs_for(chosen, compile_by, attention)))
        for variant in chosen.variants:
            if variant == "published" and (compile_by, attention) != choices[0]:
                continue
            held = _allocated(task.policy.device)
            found = measure(task, VARIANTS[variant], chosen.iterations)
            yield _result(chosen, (variant, compile_by, attention), found, held)
        del task
        gc.collect()
        if torch.device(chosen.device).type == "cuda":
            torch.cuda.empty_cache()


def _result(
    chosen: argparse.Namespace, names: tuple[str, str, str], found: Measurement, held: float
) -> Result:
    operations = chosen.prompts * chosen.samples * _operations(chosen, found.evaluations)
    return Result(
        *names,
        seconds=found.seconds,
        evaluations=found.evaluations,
        tflops=operations / 1e12 / found.seconds["total"],
        memory_gib=(held + found.peak_mb * 2**20) / GIB,
    )


def _operations(chosen: argparse.Namespace, evaluations: dict[str, float]) -> float:
    """Of one picture; activations that are computed anew count as work."""
    size = FluxSize.from_config({**vars(FluxSize()), **transformer_config(chosen)})
    return operations_per_picture(
        size.products((chosen.size // 16) ** 2, TEXT_LENGTH),
        evaluations["rollout"],
        evaluations["update"],
        train_all=chosen.train == "full",
        recomputed=0.0 if chosen.keep_activations else 1.0,
        with_reference=False,
    )


def _allocated(device: torch.device) -> float:
    return float(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0.0


# --- the command ----------------------------------------------------------------------------------


HEADS = (
    *("variant", "compile", "attention", "rollout + decoding + update = s per iteration"),
    *("evaluations per picture", "TFLOP/s", "of peak", "peak memory", "faster"),
)


def row(found: Result, peak: float | None, published: Result | None) -> str:
    """A line of the Markdown table."""
    seconds = found.seconds
    phases = " + ".join(f"{seconds[phase]:.2f}" for phase in ("rollout", "decode", "update"))
    cells = (
        *(found.variant, found.compile, found.attention),
        f"{phases} = {seconds['total']:.2f}",
        f"{found.evaluations['rollout']:.2f} / {found.evaluations['update']:.2f}",
        f"{found.tflops:.4g}",
        f"{found.tflops / peak:.0%}" if peak else "-",
        f"{found.memory_gib:.1f} GiB",
        f"{published.seconds['total'] / seconds['total']:.2f}x" if published else "-",
    )
    return f"| {' | '.join(cells)} |"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    several = partial(add, nargs="+")
    add("--train", choices=("lora", "full"), default="lora")
    several("--variants", choices=list(VARIANTS), default=list(VARIANTS))
    several("--compile", choices=("off", "inductor", "aot_eager"), default=["off"])
    several("--attention", default=["native"], help="diffusers' attention backends")
    add("--optimizer", choices=("adamw", "adamw_8bit"), default="adamw_8bit")
    add("--weights", choices=("float32", "bfloat16_stochastic"), help="of what is trained; default:"
        " bfloat16_stochastic for full training, float32 for LoRA")  # fmt: skip
    add("--keep-activations", action="store_true", help="use no gradient checkpointing")
    defaults = {"prompts": 1, "steps": 25, "start": 0, "iterations": 1, "micro_batch": 3}
    add_task_options(parser, **defaults, size=720)
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--small", action="store_true", help="use a small transformer")
    add("--peak", type=float, help="the device's bfloat16 TFLOP/s, if not known here")
    chosen = parser.parse_args(arguments)
    for complaint in _complaints(chosen):
        parser.error(complaint)
    is_half = chosen.train == "full" and chosen.dtype == "bfloat16"
    chosen.weights = chosen.weights or ("bfloat16_stochastic" if is_half else "float32")
    return chosen


def _complaints(chosen: argparse.Namespace) -> Iterator[str]:
    yield from task_complaints(chosen)
    if chosen.size % 16:
        yield f"--size must be a multiple of 16, got {chosen.size}"
    if torch.device(chosen.device).type == "cpu" and not chosen.small:
        yield "FLUX.1-dev's size needs a GPU with 80 GB; without one, use --small"


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    about, peak = environment(torch.device(chosen.device)), peak_of(chosen)
    kind = "a small transformer" if chosen.small else "FLUX.1-dev's size"
    about["task"] = (
        f"{kind}, random weights, {chosen.dtype}, {chosen.train} training with {chosen.optimizer}, "
        f"weights {chosen.weights}; {chosen.prompts} x {chosen.samples} pictures of "
        f"{chosen.size}x{chosen.size}, {chosen.steps} steps, window {chosen.window} from "
        f"{chosen.start}, {chosen.optimizer_steps} optimizer steps, median of {chosen.iterations}"
    )
    print("\n".join(f"{key}: {value}" for key, value in about.items()) + "\n")
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|", flush=True)
    found: list[Result] = []
    for result in results(chosen):
        found.append(result)
        published = next((r for r in found if r.variant == "published"), None)
        print(row(result, peak, published), flush=True)
    if chosen.json:
        content = {**about, "results": [asdict(result) for result in found]}
        chosen.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
