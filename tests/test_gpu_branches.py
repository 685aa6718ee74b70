"""What the parts of gpu.sh do only on a GPU, on one that exists in shapes only.

``gpu.sh --small`` shows on a CPU that the parts work; this shows that they name the right devices
and functions where there is a GPU. Nothing is computed, so the numbers mean nothing, and backward
passes are left out (see ``fake_gpu``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic, perf_counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from fake_gpu import fake_gpu
from gpu import full, machine, outside
from gpu.evaluation import Evaluations, profiled
from gpu.iterations import Batches, Bench, Wanted
from gpu.job import Job, latest
from gpu.models import SMALL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mixgrpo.files.json_lines import read_objects

GIB = 2**30
SCALE = replace(SMALL, steps=4, window=2, samples=2, optimizer_steps=1, start=1)


class Event:
    """One of CUDA's, which has passed when it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self, stream: object = None) -> None:
        self.at = perf_counter()

    def synchronize(self) -> None:
        """It has passed."""

    def elapsed_time(self, end: Event) -> float:
        return 1000 * max(1e-9, end.at - self.at)


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Module._apply, which cannot replace a parameter that is fake already."""
    for child in self.children():
        _apply(child, fn)
    for own in (self._parameters, self._buffers):
        for name, tensor in own.items():
            if tensor is None or (changed := fn(tensor)) is tensor:
                continue
            if isinstance(tensor, nn.Parameter):
                changed = nn.Parameter(changed.detach(), requires_grad=tensor.requires_grad)
            own[name] = changed
    return self


def _valueless(name: str, value: Any) -> Callable[[Tensor], Any]:
    own = getattr(Tensor, name)
    return lambda tensor: value if isinstance(tensor, FakeTensor) else own(tensor)


STUBS: dict[str, Any] = {
    "torch.cuda.Event": Event,
    "torch.cuda.synchronize": lambda device=None: None,
    "torch.cuda.current_stream": lambda device: None,
    "torch.cuda.empty_cache": lambda: None,
    "torch.cuda.reset_peak_memory_stats": lambda device: None,
    "torch.cuda.mem_get_info": lambda device: (70 * GIB, 80 * GIB),
    "torch.cuda.memory_reserved": lambda device: 9 * GIB,
    "torch.cuda.memory_allocated": lambda device: 5 * GIB,
    "torch.cuda.max_memory_allocated": lambda device: 6 * GIB,
    "torch.cuda.max_memory_reserved": lambda device: 7 * GIB,
    "torch.cuda.get_device_name": lambda device: "NVIDIA Nothing",
    "torch.cuda.get_device_properties": lambda index: SimpleNamespace(total_memory=80 * GIB),
    "torch.Tensor.backward": lambda self: None,
    "torch.Tensor.item": _valueless("item", 0.5),
    "torch.Tensor.__float__": _valueless("__float__", 0.5),
    "torch.Tensor.__bool__": _valueless("__bool__", True),
    "torch.nn.Module._apply": _apply,
    "mixgrpo.methods.grpo._require_finite": lambda *_: None,
}


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A part's job on the GPU, inside it."""
    with contextlib.ExitStack() as stack:
        for name, stub in STUBS.items():
            stack.enter_context(mock.patch(name, stub))
        stack.enter_context(fake_gpu()).watching = False
        yield Job("part", "cuda", True, tmp_path / "results.jsonl", monotonic() + 600)


def results(job: Job) -> dict[str, dict[str, Any]]:
    """They must all have worked."""
    found = latest(read_objects(job.results))[job.part]
    assert [result["error"] for result in found.values() if "error" in result] == []
    return found


def test_the_machine_tells_its_card_and_what_cuda_takes(job: Job) -> None:
    machine.perform(replace(job, small=False, part="machine"))
    found = results(replace(job, part="machine"))
    assert found["machine"]["card"] == "NVIDIA Nothing"
    assert found["machine"]["context_gib"] == 1.0
    assert {f"product {name}" for name in machine.PRODUCTS} < set(found)
    assert found["copy"]["gb_per_second"] > 0


def test_an_iteration_tells_its_memory_and_the_optimizers_time(job: Job) -> None:
    knobs = SCALE.knobs(train="lora")
    bench = Bench(job, SCALE, knobs, Batches(2, 2))
    bench.measure(Wanted("MixGRPO", "off", SCALE.samples, SCALE.steps))
    (found,) = results(job).values()
    memory = {"allocated": 6.0, "reserved": 7.0, "context": 1.0, "card": 80.0}
    assert found["memory_gib"] == memory
    assert 0 < found["seconds"]["optimizer"] < found["seconds"]["update"]


def test_full_training_asks_for_the_cards_memory(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "SMALL", SCALE)
    monkeypatch.setattr(full, "wanted", lambda scale, compiler: [])
    asked: list[float] = []
    choices = full.fitting
    monkeypatch.setattr(
        full, "fitting", lambda scale, knobs, total: asked.append(total) or choices(scale, knobs, 1)
    )
    full.perform(job)
    assert asked == [80.0]


def test_an_evaluation_is_timed_and_profiled(job: Job) -> None:
    bench = Evaluations(job, SCALE)
    bench.report("rollout", 2, trains=False)
    bench.report("update", 2, trains=True, backend="_native_math", recompute_every=0)
    found = results(job)
    assert found["rollout"]["memory_gib"] == found["update"]["memory_gib"] == 6.0
    assert profiled(lambda: None)["busy"] is None


def test_other_networks_sample_outside_the_window(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What has no values cannot be compiled.
    monkeypatch.setattr(outside, "without_gradients", lambda module, compiler: module)
    bench = outside.Comparison(job, SCALE)
    module = bench.policy.module
    bench.report("as in the window", lambda: module)
    bench.report("float8", lambda: outside.in_float8(outside.merged(module)))
    assert {name: result["memory_gib"] for name, result in results(job).items()} == {
        "as in the window": 6.0,
        "float8": 6.0,
    }
