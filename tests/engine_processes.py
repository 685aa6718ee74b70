"""What tests/test_engines.py runs in several processes, which are started once: starting is slow.

engine_processes.py FOLDER [SOURCE], with jobs.json in FOLDER: command lines of
trainings; SOURCE is the folder of an earlier call, whose states are resumed instead of the own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from whole_states import whole

from mixgrpo import trainer
from mixgrpo.commands.train import parse
from mixgrpo.config import EngineConfig
from mixgrpo.engines import Engine, Network
from mixgrpo.engines.data_parallel import DataParallel
from mixgrpo.engines.distributed import process_group
from mixgrpo.engines.fsdp import FullySharded
from mixgrpo.engines.zero import Zero

CPU = torch.device("cpu")
STEPS, MICRO, ROWS = 3, 2, 4
MAX_NORM = 0.05
SMALL_GPU: dict[str, Any] = {"gather": "evaluation", "reduce": "micro_batch"}
VARIANTS: dict[str, EngineConfig] = {
    "ddp": EngineConfig("ddp"),
    "fsdp": EngineConfig("fsdp"),
    "fsdp, rollout": EngineConfig("fsdp", gather="rollout"),
    "fsdp, small": EngineConfig("fsdp", **SMALL_GPU),
    "fsdp, hybrid": EngineConfig("fsdp", reduce="micro_batch", hybrid=True),
    "fsdp, hybrid, once": EngineConfig("fsdp", hybrid=True),
    "fsdp, offload": EngineConfig("fsdp", offload=True),
    "zero2": EngineConfig("deepspeed", zero_stage=2),
    "zero2, small": EngineConfig("deepspeed", zero_stage=2, **SMALL_GPU),
    "zero3": EngineConfig("deepspeed", zero_stage=3),
    "zero3, small": EngineConfig("deepspeed", zero_stage=3, **SMALL_GPU),
}


class Net(nn.Module):
    """Two blocks and a layer outside them, of sizes that nothing divides; half of one is frozen."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList([nn.Linear(4, 7), nn.Linear(7, 5)])
            self.out = nn.Linear(5, 3)
        nn.init.constant_(self.blocks[0].bias, 0.3)  # of any seed: no checkpoint holds it
        self.blocks[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.out(x)


def adamw(parameters: list[nn.Parameter]) -> tuple[Optimizer, LRScheduler]:
    optimizer = AdamW(parameters, lr=0.03, weight_decay=0.1)
    return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def make_engine(
    knobs: EngineConfig, seed: int = 0, empty: bool = False, dtype: torch.dtype = torch.float32
) -> Engine:
    """An engine for a net; ``empty``: one without memory, filled by the engine."""
    net, stored = Net(seed), None
    net.blocks[0].bias.data = net.blocks[0].bias.data.to(dtype)
    if empty and knobs.kind != "ddp" and (knobs.kind == "fsdp" or knobs.zero_stage == 3):
        stored, net = dict(net.state_dict()), net.to("meta")
    network = Network(net, list(net.blocks), dtype, stored)
    kinds = {"fsdp": FullySharded, "deepspeed": Zero}
    if knobs.kind in kinds:
        return kinds[knobs.kind](network, knobs, CPU, adamw)
    return DataParallel(net, CPU, adamw)


def inputs() -> Tensor:
    """[STEPS, MICRO, ROWS, 4], the same in every process."""
    return torch.randn(STEPS, MICRO, ROWS, 4, generator=torch.Generator().manual_seed(3))


def learn(engine: Engine, steps: range) -> list[float]:
    """Trains on this process's rows; returns the gradient norms."""
    norms = []
    for step in steps:
        for micro in range(MICRO):
            rows = inputs()[step, micro].chunk(engine.world_size)[engine.rank]
            with engine.accumulate(last=micro == MICRO - 1):
                engine.backward((engine.module(rows) - 1).square().mean() / MICRO)
        norms.append(engine.clip_gradients(MAX_NORM).item())
        engine.step()
    return norms


def evaluate(engine: Engine) -> Tensor:
    with torch.no_grad(), engine.gathered():
        return torch.stack([engine.module(rows) for rows in inputs()[0]])


def look_at(knobs: EngineConfig, folder: Path, source: Path) -> dict[str, Any]:
    """Trains, saves after two steps, trains on; resumes what is in ``source`` in another engine."""
    engine = make_engine(knobs, empty=True)
    before = evaluate(engine)
    norms = learn(engine, range(2))
    dcp.save(engine.state(), checkpoint_id=folder)
    middle = evaluate(engine)
    found = whole(engine.state())
    norms += learn(engine, range(2, STEPS))

    resumed = make_engine(knobs, seed=1)
    resumed.restore(partial(dcp.load, checkpoint_id=source))
    continued = evaluate(resumed)
    learn(resumed, range(2, STEPS))
    return {
        "before": before,
        "middle": middle,
        "continued": continued,
        "norms": norms,
        "state": found,
        "weights": whole(engine.weights()),
        "resumed": whole(resumed.weights()),
        "exchanged": exchange(engine),
    }


def exchange(engine: Engine) -> Tensor:
    """The output once all weights have been changed from outside."""
    evaluate(engine)
    with torch.no_grad():
        for shard in engine.shards:
            shard.mul_(0.5)
    engine.refresh()
    return evaluate(engine)


def not_finite(knobs: EngineConfig) -> float:
    """The norm of gradients of which one process's hold a NaN."""
    engine = make_engine(knobs)
    rows = inputs()[0, 0]
    if engine.rank == 1:
        rows[0, 0] = float("nan")
    with engine.accumulate(last=True):
        engine.backward(engine.module(rows).mean())
    return engine.clip_gradients(1.0).item()


def in_bfloat16(knobs: EngineConfig) -> dict[str, Any]:
    """As autocast computes: float32 weights, one frozen one in bfloat16 beside them."""
    engine = make_engine(knobs, empty=True, dtype=torch.bfloat16)
    # No cache, which outlives the weights that ZeRO-3 gives up; a policy opens one per evaluation.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return {
            "before": evaluate(engine),
            "norms": learn(engine, range(1)),
            "dtypes": sorted({str(shard.dtype) for shard in engine.shards}),
        }


def look_at_all(folder: Path, source: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name, knobs in VARIANTS.items():
        with mock.patch.dict(os.environ, machines()):
            found[name] = look_at(knobs, folder / "states" / name, source / "states" / name)
            found[name]["not_finite"] = not_finite(knobs)
    return found


def machines() -> dict[str, str]:
    """Two of them, as far as hybrid sharding is concerned."""
    return {"LOCAL_WORLD_SIZE": str(max(1, dist.get_world_size() // 2))}


def jobs(folder: Path) -> Iterator[list[str]]:
    if (folder / "jobs.json").exists():
        yield from json.loads((folder / "jobs.json").read_text())


def main(folder: Path, source: Path) -> None:
    with process_group(1) as process:
        found = look_at_all(folder, source)
        for words in jobs(folder):
            with (
                mock.patch.object(trainer, "process_group", lambda _: nullcontext(process)),
                mock.patch("mixgrpo.report.summary.summarize", return_value=""),
            ):
                trainer.train(parse(words[1:]))
        # Last: DeepSpeed remembers for good that a process has used autocast.
        for name, knobs in VARIANTS.items():
            with mock.patch.dict(os.environ, machines()):
                found[name]["bfloat16"] = in_bfloat16(knobs)
        if process.rank == 0:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[-1]))
