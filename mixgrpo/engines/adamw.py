"""AdamW for small GPUs: 8-bit moments, and bfloat16 weights with stochastic rounding.

Every state is a tensor with the same layout as its weight: sharded weights (DTensor) have sharded
states, which can be saved in any tensor checkpoint and loaded with any number of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mixgrpo.noise import key_seed

BLOCK = 256  # consecutive values of a row that share a scale
LEAST = 4096  # the moments of weights with fewer values stay float32
_DECADES = 7
_FRACTION = 0xFFFF  # the low bits of a float32 that bfloat16 lacks


class FrugalAdamW(Optimizer):
    """AdamW (arXiv 1711.05101), computed in float32 whatever the dtype of weights and moments.

    With float32 weights and ``eight_bit`` false, it is equivalent to torch's AdamW.

    Args:
        parameters: float32 or bfloat16 weights. bfloat16 weights are rounded stochastically, so
            that they equal the exact weights in expectation: updates that are smaller than the last
            bit accumulate instead of being lost.
        learning_rate, betas, weight_decay, epsilon: as in torch's AdamW.
        eight_bit: store moments as 8-bit codes, in blocks of up to 256 values (arXiv 2110.02861);
            the moments of vectors and of weights with fewer than 4096 values stay float32. Codes
            are also rounded stochastically: with rounding to nearest, an average that moves by less
            than half a code per step would never change. The square root of the second moment is
            stored, so that both moments have the same range and neither becomes zero where the
            other is not.
        seed: seed of the rounding; use the same one on every process to keep copies of a weight
            equal.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        eight_bit: bool,
        seed: int,
        epsilon: float = 1e-8,
    ) -> None:
        knobs = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay, "eps": epsilon}
        super().__init__(parameters, knobs)
        self.eight_bit = eight_bit
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "the loss is evaluated by the caller"
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(self._begin(parameter))
                state["step"] += 1
                self._change(parameter, state, group, index)

    def _begin(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = {"step": torch.tensor(0.0)}
        block = block_of(parameter.shape) if self.eight_bit else 0
        for name in ("exp_avg", "exp_avg_sq"):
            dtype = torch.uint8 if block else torch.float32
            state[name] = torch.zeros_like(parameter, dtype=dtype)
            if block:  # with a scale of 0, every code decodes to 0
                one_each = parameter.detach()[..., : parameter.shape[-1] // block]
                state[f"{name}_scale"] = torch.zeros_like(
                    one_each, dtype=torch.float32, memory_format=torch.contiguous_format
                )
        return state

    def _change(
        self, parameter: nn.Parameter, state: dict[str, Tensor], knobs: dict[str, Any], index: int
    ) -> None:
        beta1, beta2 = knobs["betas"]
        step, rate = int(state["step"]), float(knobs["lr"])
        weight, gradient = _part(parameter), _part(parameter.grad).float()
        generator = torch.Generator(weight.device).manual_seed(key_seed(self.seed, step, index))
        mean = _read(state, "exp_avg").lerp_(gradient, 1 - beta1)
        square = _read(state, "exp_avg_sq").lerp_(gradient.square(), 1 - beta2)
        _write(state, "exp_avg", mean, generator)
        _write(state, "exp_avg_sq", square, generator)
        root = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(knobs["eps"])
        exact = weight.float()  # the weight itself if it is float32
        exact.mul_(1 - rate * knobs["weight_decay"])
        exact.addcdiv_(mean, root, value=-rate / (1 - beta1**step))
        if weight.dtype == torch.bfloat16:
            weight.copy_(round_stochastically(exact, generator))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # torch would cast the states to the dtype of their weight, which takes up to four times
        # their memory; they have dtypes of their own.
        super().load_state_dict({**state_dict, "state": {}})
        saved = state_dict["state"]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, parameter in zip(_keys(state_dict), parameters, strict=True):
            for name, value in saved.get(key, {}).items():
                device = "cpu" if name == "step" else parameter.device
                self.state[parameter][name] = value.detach().to(device)


def block_of(shape: torch.Size) -> int:
    """Number of values of a row that share a scale; 0 if the moments stay float32."""
    if len(shape) < 2 or shape.numel() < LEAST:
        return 0
    block = min(BLOCK, shape[-1])
    return block if block >= 32 and shape[-1] % block == 0 else 0


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds float32 to bfloat16 up or down, so that the expectation equals the exact value."""
    bits = values.view(torch.int32)  # grows with the magnitude, linearly between neighbours
    noise = torch.randint(
        _FRACTION + 1, values.shape, generator=generator, device=values.device, dtype=torch.int32
    )
    return ((bits + noise) & ~_FRACTION).view(torch.float32).bfloat16()


# ---- 8 bits


@functools.cache
def code_table(signed: bool) -> Tensor:
    """[256] ascending float32, the values of the codes: 0, 1, and 7 decades below 1.

    Lower decades have fewer values, from 64 (128 unsigned) down to 1 (2) for each sign. This is the
    dynamic tree data type of arXiv 2110.02861.
    """
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        count = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        middles = 10.0 ** (decade + 1 - _DECADES) * (edges[:-1] + edges[1:]) / 2
        values += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def _table_on(device: torch.device, signed: bool) -> Tensor:
    return code_table(signed).to(device)


def encode(
    values: Tensor, block: int, signed: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """[..., n] float32 -> codes [..., n] uint8 and scales [..., n/block] float32.

    A value is rounded to the code above or below it, so that the expectation is exact.
    """
    blocks = values.unflatten(-1, (-1, block))
    scales = blocks.abs().amax(-1)
    shares = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    table = _table_on(values.device, signed)
    above = torch.bucketize(shares, table, out_int32=True).clamp_(1, len(table) - 1)
    below = table[above - 1]
    chance = (shares - below) / (table[above] - below)
    drawn = torch.rand(chance.shape, generator=generator, device=chance.device)
    codes = above - (drawn >= chance).int()
    return codes.to(torch.uint8).flatten(-2), scales


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Inverse of ``encode``: codes and scales -> [..., n] float32."""
    blocks = codes.int().unflatten(-1, (scales.shape[-1], -1))
    return (_table_on(codes.device, signed)[blocks] * scales[..., None]).flatten(-2)


def _read(state: dict[str, Tensor], name: str) -> Tensor:
    """This process's part of a moment in float32; the stored tensor itself if it is float32."""
    stored, scale = _part(state[name]), state.get(f"{name}_scale")
    if scale is None:
        return stored
    found = decode(stored, _part(scale), signed=name == "exp_avg")
    return found if name == "exp_avg" else found.square_()


def _write(state: dict[str, Tensor], name: str, moment: Tensor, generator: torch.Generator) -> None:
    scale = state.get(f"{name}_scale")
    if scale is None:
        return  # the moment was updated in place
    signed = name == "exp_avg"
    values = moment if signed else moment.sqrt()
    codes, scales = encode(values, values.shape[-1] // scale.shape[-1], signed, generator)
    _part(state[name]).copy_(codes)
    _part(scale).copy_(scales)


def _part(tensor: Tensor | None) -> Tensor:
    """This process's part of a tensor that may be sharded; it shares the tensor's memory."""
    assert tensor is not None
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _keys(state_dict: dict[str, Any]) -> list[Any]:
    return [key for group in state_dict["param_groups"] for key in group["params"]]
