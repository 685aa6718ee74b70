"""The average of the weights: its decay, swapping, and loading."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mixgrpo.engines.ema import Ema


def weights(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 4), (5,), ())
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def moved(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1)


def copies(tensors: list[nn.Parameter] | list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def all_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_starts_at_the_weights_without_sharing_their_memory() -> None:
    parameters = weights()
    ema = Ema(parameters, 0.9)
    before = copies(parameters)
    moved(parameters)
    assert all_equal(ema.average, before)
    assert ema.updates == 0


@pytest.mark.parametrize("highest", [0.0, 0.3, 0.999])
def test_decay_rises_to_its_highest(highest: float) -> None:
    """average <- d*average + (1-d)*weights with d = min((1+n)/(10+n), highest), n = 0, 1, ..."""
    parameters = weights()
    ema = Ema(parameters, highest)
    expected = [tensor.double() for tensor in copies(parameters)]
    for n in range(20):
        moved(parameters)
        ema.update()
        decay = min((1 + n) / (10 + n), highest)
        expected = [
            decay * average + (1 - decay) * parameter.detach().double()
            for average, parameter in zip(expected, parameters, strict=True)
        ]
    assert ema.updates == 20
    for average, value in zip(ema.average, expected, strict=True):
        torch.testing.assert_close(average.double(), value, rtol=1e-6, atol=1e-6)


def test_update_leaves_the_weights_alone() -> None:
    parameters = weights()
    ema = Ema(parameters, 0.9)
    moved(parameters)
    before = copies(parameters)
    ema.update()
    assert all_equal(copies(parameters), before)
    assert not any(average.requires_grad for average in ema.average)


@pytest.mark.parametrize("fails", [False, True])
def test_swapped_restores_every_bit(fails: bool) -> None:
    parameters = weights()
    ema = Ema(parameters, 0.9)
    moved(parameters)
    ema.update()
    plain, average = copies(parameters), copies(ema.average)
    assert not all_equal(plain, average)
    try:
        with ema.swapped():
            assert all_equal(copies(parameters), average)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert all_equal(copies(parameters), plain)
    assert all_equal(ema.average, average)


def test_an_average_put_back_continues_as_the_one_saved() -> None:
    """As a resumed run does: through the weights, while they are exchanged for the average."""
    parameters = weights()
    ema = Ema(parameters, 0.9)
    for _ in range(3):
        moved(parameters)
        ema.update()
    resumed = Ema(parameters, 0.9)
    with resumed.swapped(), torch.no_grad():
        for parameter, saved in zip(parameters, copies(ema.average), strict=True):
            parameter.copy_(saved)
    resumed.updates = ema.updates
    moved(parameters)
    for each in (ema, resumed):
        each.update()
    assert resumed.updates == 4
    assert all_equal(resumed.average, ema.average)


def test_whoever_holds_copies_hears_of_every_exchange() -> None:
    heard: list[Tensor] = []
    parameters = weights()
    ema = Ema(parameters, 0.9, changed=lambda: heard.append(parameters[0].detach().clone()))
    moved(parameters)
    with ema.swapped():
        assert len(heard) == 1
    assert torch.equal(heard[0], ema.average[0])
    assert torch.equal(heard[1], parameters[0])


def test_an_average_on_the_cpu_is_no_view_of_the_weights() -> None:
    parameters = weights()
    ema = Ema(parameters, 0.9, on_cpu=True)
    before = copies(ema.average)
    moved(parameters)
    assert {average.device.type for average in ema.average} == {"cpu"}
    assert all_equal(ema.average, before)
