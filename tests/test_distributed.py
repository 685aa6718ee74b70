"""Which device a process takes, and how it leaves; GPUs are played."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from mixgrpo.engines import distributed
from mixgrpo.engines.distributed import leave, process_group


@pytest.fixture
def gpus(monkeypatch):
    """Two of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken = mock.Mock()
    monkeypatch.setattr(torch.cuda, "set_device", taken)
    # So that what is set for a GPU is set back.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    return taken


def test_more_processes_than_gpus_are_refused(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    complaint = r"8 processes .* torch sees 2 GPUs; start 2"
    with pytest.raises(ValueError, match=complaint), process_group(1):
        pass
    gpus.assert_not_called()


def test_a_local_rank_beyond_the_gpus_is_refused(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with (
        pytest.raises(ValueError, match="LOCAL_RANK is 2, but torch sees 2 GPUs"),
        process_group(1),
    ):
        pass
    gpus.assert_not_called()


def test_a_process_takes_its_gpu_without_rounded_convolutions(gpus, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("RANK", raising=False)
    with process_group(threads) as process:
        assert process.device == torch.device("cuda", 1)
    gpus.assert_called_once_with(process.device)
    assert torch.backends.cudnn.allow_tf32 is False


@pytest.mark.parametrize(
    ("visible", "refused"), [(None, True), ("0", True), ("junk", True), ("", False)]
)
def test_a_driver_that_torch_cannot_use_is_told_of(monkeypatch, tmp_path, visible, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if refused:
        with pytest.raises(ValueError, match="TORCH_INDEX_URL"), process_group(1):
            pass
        return
    with process_group(torch.get_num_threads()) as process:
        assert process.device.type == "cpu"


@pytest.mark.parametrize(
    ("code", "rank", "at_once"),
    [(1, "0", True), (0, "0", False), (1, None, False), (143, None, True)],
)
def test_a_failed_process_of_several_waits_for_no_other(monkeypatch, code, rank, at_once):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    gone = mock.Mock(side_effect=SystemExit(-1))
    monkeypatch.setattr("mixgrpo.engines.distributed.os._exit", gone)
    with pytest.raises(SystemExit) as left:
        leave(code)
    assert gone.called == at_once
    assert left.value.code == (-1 if at_once else code)
