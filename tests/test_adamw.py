"""AdamW of 8 bits, and bfloat16 weights rounded at random."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mixgrpo.engines.adamw import (
    BLOCK,
    FrugalAdamW,
    block_of,
    code_table,
    decode,
    encode,
    round_stochastically,
)

KNOBS = {"betas": (0.9, 0.99), "weight_decay": 0.01}


def optimizer(parameters: list[nn.Parameter], eight_bit: bool, rate: float = 0.01) -> FrugalAdamW:
    return FrugalAdamW(parameters, rate, eight_bit=eight_bit, seed=3, **KNOBS)


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def loss_of(parameters: list[nn.Parameter], step: int) -> Tensor:
    """A noisy quadratic with curvatures from 0.1 to 10."""
    generator = torch.Generator().manual_seed(100 + step)
    total = torch.zeros(())
    for p in parameters:
        curvature = torch.logspace(-1, 1, p.shape[-1])
        noise = torch.randn(p.shape, generator=generator)
        total = total + (curvature * (p.float() - 0.5 + 0.1 * noise) ** 2).mean()
    return total


def descend(parameters: list[nn.Parameter], by: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(parameters, step)
        loss.backward()
        by.step()
        by.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


# ---- the arithmetic


def test_with_float32_it_is_torchs() -> None:
    ours, theirs = weights((20, 300), (7,)), weights((20, 300), (7,))
    descend(ours, optimizer(ours, eight_bit=False), range(10))
    descend(theirs, torch.optim.AdamW(theirs, lr=0.01, **KNOBS), range(10))
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls_as_with_adamw(eight_bit: bool, dtype: torch.dtype) -> None:
    ours, theirs = weights((16, 512), dtype=dtype), weights((16, 512))
    found = descend(ours, optimizer(ours, eight_bit, rate=0.03), range(80))
    expected = descend(theirs, torch.optim.AdamW(theirs, lr=0.03, **KNOBS), range(80))
    assert expected[-1] < 0.2 * expected[0]
    assert found[40] == pytest.approx(expected[40], rel=0.05)
    assert found[-1] == pytest.approx(expected[-1], rel=0.05)


def test_changes_below_the_last_bit_add_up_in_bfloat16() -> None:
    """Steps of 1e-4 at a weight of 1, whose neighbours are 0.0039 and 0.0078 away."""
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    rounded = torch.ones(4096, dtype=torch.bfloat16)
    by = FrugalAdamW([parameter], 1e-4, (0.9, 0.999), 0.0, eight_bit=False, seed=0)
    for _ in range(200):
        parameter.grad = torch.ones_like(parameter)
        by.step()
        rounded -= 1e-4
    assert (rounded == 1).all()
    # Each of 4096 weights: mean 0.98, variance below 200 * 1e-4 * 0.0039.
    assert parameter.float().mean().item() == pytest.approx(0.98, abs=5 * (7.8e-5 / 4096) ** 0.5)


# ---- rounding


def test_rounding_is_unbiased() -> None:
    values = torch.tensor([1.001, -1.001, 3.14159, 1e-20, 0.99999, 65504.4, -2.0, 0.0])
    generator = torch.Generator().manual_seed(1)
    count = 40_000
    drawn = round_stochastically(values.expand(count, -1).contiguous(), generator).double()
    below, above = drawn.amin(0), drawn.amax(0)
    exact = values.double()
    assert ((below <= exact) & (exact <= above)).all()
    assert all(len(drawn[:, i].unique()) <= 2 for i in range(len(values)))
    error = 5 * (above - below) / 2 / count**0.5
    assert ((drawn.mean(0) - exact).abs() <= error).all()
    assert (below[:6] < above[:6]).all()  # these lie between two neighbours
    assert (below[6:] == above[6:]).all()  # these are bfloat16 already


def test_copies_of_a_weight_stay_the_same() -> None:
    first, second = weights((8, 512), dtype=torch.bfloat16), weights((8, 512), dtype=torch.bfloat16)
    for parameters in (first, second):
        torch.rand(len(first))  # whatever else a process draws
        descend(parameters, optimizer(parameters, eight_bit=True), range(3))
    assert torch.equal(first[0], second[0])


# ---- 8 bits


@pytest.mark.parametrize("signed", [True, False])
def test_the_codes_values(signed: bool) -> None:
    table = code_table(signed)
    assert len(table) == len(table.unique()) == 256
    assert table.max() == 1
    assert (table == 0).sum() == 1
    assert (table < 0).sum() == (127 if signed else 0)
    # The highest decade has 64 (128) equal parts for each sign, the lowest just one (two).
    top = table[(table > 0.1) & (table < 1)]
    assert len(top) == (64 if signed else 128)
    torch.testing.assert_close(top.diff(), torch.full((len(top) - 1,), 0.9 / len(top)))
    assert table[table > 0].min().item() == pytest.approx(5.5e-7 if signed else 3.25e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_values_become_one_of_the_two_codes_beside_them_and_on_average_stay(signed: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(3, 2 * BLOCK, generator=generator) ** 3
    values = values if signed else values.abs()
    codes, scales = encode(values, BLOCK, signed, generator)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, values.shape, (3, 2))

    table, count = code_table(signed), 400
    each = scales.repeat_interleave(BLOCK, -1)
    shares = (values / each).clamp_min(table[0])
    above = torch.bucketize(shares, table).clamp(1, 255)
    low, high = table[above - 1], table[above]
    many = values.expand(count, *values.shape)
    found = decode(*encode(many, BLOCK, signed, generator), signed) / each
    is_low, is_high = ((found - side).abs() <= 1e-6 * side.abs() for side in (low, high))
    assert (is_low | is_high).all()
    # The mean of 400 lies within 5 of its standard deviations, gap * sqrt(p (1-p) / 400).
    chance = (shares - low) / (high - low)
    deviation = (high - low) * (chance * (1 - chance) / count).sqrt()
    assert ((found.mean(0) - shares).abs() <= 5 * deviation + 1e-2 * (high - low)).all()


def test_zeros_stay_zeros() -> None:
    codes, scales = encode(torch.zeros(2, BLOCK), BLOCK, True, torch.Generator())
    assert not decode(codes, scales, signed=True).any()


def test_averages_that_move_by_less_than_a_code_move() -> None:
    """A gradient of 1 for 100 steps, then none for 400: the root loses 0.05% in each."""
    parameter = nn.Parameter(torch.zeros(16, BLOCK))
    by = FrugalAdamW([parameter], 0.0, (0.9, 0.999), 0.0, eight_bit=True, seed=0)
    first = torch.arange(BLOCK) == 0  # of each block; it alone sets the block's scale
    for step in range(500):
        gradient = torch.where(first, 10.0, 1.0 if step < 100 else 0.0)
        parameter.grad = gradient.expand(16, -1).clone()
        by.step()
    state = by.state[parameter]
    root = decode(state["exp_avg_sq"], state["exp_avg_sq_scale"], signed=False)[:, 1:]
    peak = (1 - 0.999**100) ** 0.5
    assert root.mean().item() == pytest.approx(peak * 0.999**200, rel=0.03)


def test_which_moments_are_of_8_bits() -> None:
    """Blocks lie within rows, so that rows can be spread over processes."""
    assert block_of(torch.Size((3072, 12288))) == 256
    assert block_of(torch.Size((3072, 64))) == 64
    assert block_of(torch.Size((9216,))) == 0
    assert block_of(torch.Size((15, 256))) == 0
    assert block_of(torch.Size((100, 300))) == 0


def test_what_the_moments_take() -> None:
    parameter = weights((64, 1024))[0]
    by = optimizer([parameter], eight_bit=True)
    descend([parameter], by, range(1))
    size = sum(value.nbytes for name, value in by.state[parameter].items() if name != "step")
    assert size == 64 * 1024 * 2 * (1 + 4 / BLOCK)


# ---- resuming


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_exactly(eight_bit: bool, dtype: torch.dtype) -> None:
    parameters = weights((16, 512), (9,), dtype=dtype)
    by = optimizer(parameters, eight_bit)
    descend(parameters, by, range(5))
    file = io.BytesIO()
    torch.save(by.state_dict(), file)
    others = copy.deepcopy(parameters)
    descend(parameters, by, range(5, 10))

    resumed = optimizer(others, eight_bit, rate=1.0)  # the saved rate is what counts
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    descend(others, resumed, range(5, 10))
    for expected, found in zip(parameters, others, strict=True):
        assert torch.equal(expected, found)
    for expected, found in zip(by.state.values(), resumed.state.values(), strict=True):
        assert {name: value.dtype for name, value in found.items()} == {
            name: value.dtype for name, value in expected.items()
        }


# ---- sharded weights


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone: what is sharded here goes the ways of any number of shards."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_weights_have_states_that_are_sharded_alike(
    mesh: DeviceMesh, dtype: torch.dtype
) -> None:
    (whole,) = weights((16, 512), dtype=dtype)
    sharded = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(0)]))
    ours, theirs = optimizer([whole], eight_bit=True), optimizer([sharded], eight_bit=True)
    for step in range(3):
        whole.grad = torch.sin(torch.arange(16 * 512.0) + step).view(16, 512).to(dtype)
        sharded.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
        ours.step()
        theirs.step()
    assert torch.equal(sharded.full_tensor(), whole)
    for name, value in theirs.state[sharded].items():
        if name != "step":
            assert isinstance(value, DTensor)
            assert value.placements == (Shard(0),)
            assert torch.equal(value.full_tensor(), ours.state[whole][name])
