"""ZeRO (DeepSpeed): shards optimizer state and gradients (stage 2) and also weights (stage 3).

Weights are float32, and computation uses autocast. If the autocast dtype is bfloat16, DeepSpeed
gathers the weight matrices and sums their gradients in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixgrpo.config import EngineConfig
from mixgrpo.engines import MakeOptimizer, Network, Read
from mixgrpo.engines.processes import Processes, restore_schedule
from mixgrpo.engines.zero_setup import (
    import_deepspeed,
    initialize,
    no_learning,
    partition,
    settings,
)

_HELD = -1  # marks a weight as used by this engine in its list of modules that use it


class Zero(Processes):
    """See ``mixgrpo.engines.Engine``."""

    def __init__(
        self,
        network: Network,
        knobs: EngineConfig,
        device: torch.device,
        make_optimizer: MakeOptimizer,
    ) -> None:
        super().__init__(device)
        import_deepspeed(device)
        self.knobs = knobs
        self.settings = settings(knobs, network.dtype)
        self.sharded: list[nn.Module] = []
        self._own(network)
        named = network.module.named_parameters()
        self.trained = {name: p for name, p in named if p.requires_grad}
        names = {id(parameter): name for name, parameter in self.trained.items()}
        torch_optimizer, self.schedule = make_optimizer(list(self.trained.values()))
        self.torch_optimizer = torch_optimizer
        self.groups = [[names[id(p)] for p in g["params"]] for g in torch_optimizer.param_groups]
        self.module = initialize(network.module, self.settings, optimizer=torch_optimizer)
        self.optimizer = self.module.optimizer
        self._open: ExitStack | None = None  # set while gradients of an optimizer step accumulate

    @property
    def shards(self) -> list[Tensor]:
        if self.knobs.zero_stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return list(self.optimizer.single_partition_of_fp32_groups)

    def refresh(self) -> None:
        """Copies the optimizer's float32 weights to the module."""
        if self.knobs.zero_stage == 2:
            self.optimizer.update_lp_params()
            return
        for index in range(len(self.shards)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)

    def place(self, frozen: Network) -> nn.Module:
        self._own(frozen)
        if self.knobs.zero_stage == 2:
            return frozen.module.to(self.device)
        return initialize(frozen.module, self.settings)

    def _own(self, network: Network) -> None:
        if self.knobs.zero_stage == 3:
            partition(network, self.settings, self.device)
            self.sharded.append(network.module)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if self.knobs.zero_stage == 2 or self.knobs.gather == "evaluation":
            yield
            return
        # Parameters, to which DeepSpeed has added attributes.
        held: list[Any] = [p for module in self.sharded for p in module.parameters()]
        # Not zero.GatheredParameters, which gathers float32 instead of the dtype of the products.
        held[0].all_gather_coalesced(held).wait()
        for parameter in held:  # otherwise each would be released after its first use
            parameter.ds_active_sub_modules.add(_HELD)
        try:
            yield
        finally:
            for parameter in held:
                parameter.ds_active_sub_modules.clear()
            held[0].partition(param_list=held)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        if self._open is None:
            self._open = ExitStack()
            if self.knobs.gather == "once":
                self._open.enter_context(self.gathered())
            if self.knobs.reduce == "once":
                self._open.enter_context(self.module.coalesce_grad_reduction())
        self.module.set_gradient_accumulation_boundary(last)
        yield
        if last:
            self._open.close()
            self._open = None

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss, scale_wrt_gas=False)

    def clip_gradients(self, max_norm: float) -> Tensor:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        self.optimizer.clip_grad = max_norm  # the optimizer clips in its step
        if self.knobs.zero_stage == 3:
            norm = combine_grad_norm_groups(self.optimizer._get_norm_groups())
        else:
            norm = self.optimizer.scaled_global_norm()
        norm = torch.as_tensor(norm, device=self.device)
        return torch.where(norm < 0, torch.nan, norm)  # DeepSpeed returns -1 if it is not finite

    def step(self) -> None:
        self.module.set_gradient_accumulation_boundary(True)
        self.module.step()
        self.schedule.step()

    # ---- state

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return dict(self._collect(safe_get_full_fp32_param))

    def load_weights(self, read: Read) -> None:
        weights = self._empty()
        read(weights)
        self._distribute(weights, None)
        self.refresh()

    def state(self) -> dict[str, Any]:
        state = {"model": self.weights(), "schedule": self.schedule.state_dict()}
        if self.schedule.last_epoch > 0:
            state["optimizer"] = self._optimizer_state()
        return state

    def _optimizer_state(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state as get

        state: dict[str, dict[str, Tensor]] = {}
        for key in self._moments():
            for name, value in self._collect(partial(get, optim_state_key=key)):
                state.setdefault(name, {"step": self._steps().clone()})[key] = value
        return {"state": state, "param_groups": self._named_groups()}

    def restore(self, read: Read) -> None:
        self.load_weights(lambda weights: read({"model": weights}))
        if restore_schedule(self.schedule, read):
            self._restore_optimizer(read)

    def _restore_optimizer(self, read: Read) -> None:
        self._make_moments()
        moments = {key: self._empty() for key in self._moments()}
        state = {
            name: {"step": self._steps().clone()} | {key: moments[key][name] for key in moments}
            for name in self._empty()
        }
        named = self._named_groups()
        read({"optimizer": {"state": state, "param_groups": named}})
        for key, values in moments.items():
            self._distribute(values, key)
        steps = next(iter(state.values()))["step"] if state else self._steps().clone()
        dist.broadcast(steps, 0)
        for each in self.torch_optimizer.state.values():
            each["step"].copy_(steps)
        groups = zip(self.torch_optimizer.param_groups, named, strict=True)
        for group, saved in groups:
            group.update({key: value for key, value in saved.items() if key != "params"})

    def _make_moments(self) -> None:
        if self.torch_optimizer.state:
            return
        for shard in self.shards:
            shard.grad = torch.zeros_like(shard)
        with no_learning(self.torch_optimizer):
            for index in range(len(self.shards)):
                self.optimizer._optimizer_step(index)
        for shard in self.shards:
            shard.grad = None

    def _moments(self) -> list[str]:
        state = next(iter(self.torch_optimizer.state.values()))
        return [key for key, value in state.items() if isinstance(value, Tensor) and value.dim()]

    def _steps(self) -> Tensor:
        return next(iter(self.torch_optimizer.state.values()))["step"]

    def _named_groups(self) -> list[dict[str, Any]]:
        groups = self.torch_optimizer.param_groups
        return [{**g, "params": names} for g, names in zip(groups, self.groups, strict=True)]

    # ---- one whole tensor at a time

    def _owned(self) -> Iterator[tuple[int, str, nn.Parameter]]:
        """Each trained weight with its name and the rank that holds all of it in ``state``."""
        for index, (name, parameter) in enumerate(self.trained.items()):
            yield index % self.world_size, name, parameter

    def _collect(self, get: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
        for owner, name, parameter in self._owned():
            value = get(parameter)
            if self.rank == owner:
                yield name, value.reshape(_shape(parameter)).to("cpu", copy=True)

    def _distribute(self, values: dict[str, Tensor], key: str | None) -> None:
        """Sets the weights (``key`` None) or the optimizer state ``key`` from their owners."""
        for owner, name, parameter in self._owned():
            value = values[name] if owner == self.rank else torch.empty(_shape(parameter))
            value = value.to(self.device)
            dist.broadcast(value, owner)
            self._put(parameter, value, key)

    def _put(self, parameter: Any, value: Tensor, key: str | None) -> None:
        from deepspeed import utils

        if self.knobs.zero_stage == 2:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        # DeepSpeed's counterpart for stage 3 does not handle padding of the last part.
        size = parameter.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
        part = padded[self.rank * size :][:size]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, key)

    def _empty(self) -> dict[str, Tensor]:
        return {n: torch.empty(_shape(p)) for owner, n, p in self._owned() if owner == self.rank}


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
