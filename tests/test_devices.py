"""What is particular to GPUs, as far as a CPU can show it."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

from mixgrpo.commands.before_torch import prepare
from mixgrpo.devices import Clock, deterministic, is_device_lost, is_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_who_has_too_little_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
    assert not is_device_lost(error)


def test_deterministic_kernels_only_inside() -> None:
    states = []
    with mock.patch.dict(os.environ):
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        for wanted in (False, True):
            with deterministic(wanted):
                states.append(torch.are_deterministic_algorithms_enabled())
                filled = torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert states == [False, True]
    assert not filled
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    with deterministic(True), pytest.raises(RuntimeError, match="deterministic"):
        torch.nn.functional.max_unpool1d(
            torch.ones(1, 1, 2), torch.tensor([[[0, 2]]]), kernel_size=2
        )


def test_a_clock_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 3.5])
    monkeypatch.setattr("mixgrpo.devices.perf_counter", lambda: next(moments))
    clock = Clock(torch.device("cpu"))
    assert clock.seconds(clock.now(), clock.now()) == 2.5


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, None),
    ],
)
def test_the_users_allocator_settings_stay(given: dict[str, str], expected: str | None) -> None:
    with mock.patch.dict(os.environ, given, clear=True):
        prepare()
        assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
