"""The lines of tests/on_device.py that are meant for a GPU, with a CUDA that is signatures only."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from on_device import little_memory, memory_used, waits_forbidden

GPU = torch.device("cuda", 0)
MIB = 2**20


@pytest.fixture
def cuda() -> Iterator[mock.Mock]:
    """Functions of torch.cuda that check how they are called; 64 MiB of 1 GiB are reserved."""
    answers = {
        "synchronize": None,
        "empty_cache": None,
        "memory_allocated": 5 * MIB,
        "memory_reserved": 64 * MIB,
        "get_device_properties": mock.Mock(total_memory=1024 * MIB),
        "set_per_process_memory_fraction": None,
        "get_sync_debug_mode": 0,
        "set_sync_debug_mode": None,
    }
    with mock.patch.multiple(
        torch.cuda,
        **{
            name: mock.create_autospec(getattr(torch.cuda, name), return_value=answer)
            for name, answer in answers.items()
        },
    ):
        yield torch.cuda


def test_waits_are_forbidden_inside_only(cuda: mock.Mock) -> None:
    with pytest.raises(ZeroDivisionError), waits_forbidden(GPU):
        cuda.set_sync_debug_mode.assert_called_once_with("error")
        raise ZeroDivisionError
    assert cuda.set_sync_debug_mode.call_args == mock.call(0)


def test_memory_is_what_is_allocated_without_workspaces(cuda: mock.Mock) -> None:
    with mock.patch("torch._C._cuda_clearCublasWorkspaces") as clear:
        assert memory_used(GPU) == 5 * MIB
    clear.assert_called_once_with()
    cuda.memory_allocated.assert_called_once_with(GPU)


def test_little_memory_is_what_is_reserved_and_little_more(cuda: mock.Mock) -> None:
    with pytest.raises(ZeroDivisionError), little_memory(GPU, more=64 * MIB):
        cuda.set_per_process_memory_fraction.assert_called_once_with(0.125, GPU)
        raise ZeroDivisionError
    assert cuda.set_per_process_memory_fraction.call_args == mock.call(1.0, GPU)


def test_what_the_tests_of_a_gpu_use_exists() -> None:
    assert callable(torch._C._cuda_clearCublasWorkspaces)
    assert callable(torch.cuda._sleep)
