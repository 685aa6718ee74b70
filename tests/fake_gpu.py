"""A GPU without a GPU: tensors that have shapes, dtypes and a device, but no values.

Inside ``fake_gpu()`` a tensor made on, or moved to, ``GPU`` says that it is there, and whatever is
computed from it has the shape, dtype and device that a GPU would give it; tensors on the CPU remain
real. What would make the host wait for a GPU raises ``HostWait``, and tensors on different devices
raise RuntimeError, as on a GPU. There are no backward passes: autograd's own threads look for a
real device.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
_aten = torch.ops.aten
_COPIES = (_aten._to_copy, _aten.copy_)
_WRITES = (_aten.index_put, _aten.index_put_, _aten._unsafe_index_put, _aten._index_put_impl_)
_INDEXED = (_aten.index, _aten._unsafe_index, *_WRITES)
# What a build of torch for CUDA would ask a driver for.
_PATCHES: dict[str, Any] = {
    "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    "torch.cuda.is_bf16_supported": lambda *_: True,
    "torch.cuda._lazy_init": lambda: None,
    "torch.Tensor.pin_memory": lambda tensor: tensor,
}


class HostWait(AssertionError):
    """An operation for which the host would wait until the GPU has done all its work."""


class FakeGpu(TorchDispatchMode):
    """See ``fake_gpu``.

    Attributes:
        watching: whether operations that would make the host wait raise HostWait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watching = True
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def place(self, module: nn.Module) -> nn.Module:
        """Moves a module to the GPU, for which the host may wait."""
        self.watching = False
        try:
            return module.to(GPU)
        finally:
            self.watching = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        there = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        if not there and GPU.type not in [d.type for d in leaves if isinstance(d, torch.device)]:
            return func(*args, **kwargs)
        if self.watching:
            _require_no_wait(func, args, kwargs)
        try:
            with self._fake:
                return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostWait(f"{func}: what follows depends on values on the GPU") from error


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Context in which there is one GPU, ``GPU``, whose tensors have no values."""
    torch._C._ensureCUDADeviceGuardSet()
    with contextlib.ExitStack() as stack:
        for name, replacement in _PATCHES.items():
            stack.enter_context(mock.patch(name, replacement))
        # Once something has been compiled in this process, it describes every tensor.
        stack.enter_context(mock.patch.object(logging.getLogger("torch.__trace"), "disabled", True))
        yield stack.enter_context(FakeGpu())


def _require_no_wait(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    packet = func.overloadpacket
    if packet in _COPIES:
        _require_queued_copy(func, args, kwargs)
    if packet in _INDEXED:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if any(index.device.type == "cpu" for index in indices):
            raise HostWait(f"{func}: an index on the CPU is first copied to the GPU")
        # A single value is written under a mask without looking for where the mask is true.
        masked = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        if masked and packet in _WRITES and args[2].numel() > 1:
            raise HostWait(f"{func}: where the mask is true must be known")


def _require_queued_copy(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    if func.overloadpacket is _aten.copy_:
        target, source = args[0].device, args[1].device
        queued = args[2] if len(args) > 2 else kwargs.get("non_blocking")
    else:
        source = args[0].device
        target, queued = kwargs.get("device") or source, kwargs.get("non_blocking")
    if target.type != source.type and not queued:
        raise HostWait(f"{func}: a copy from {source} to {target} that is not non_blocking")
