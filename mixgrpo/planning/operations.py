"""Floating-point operations of an iteration, and the time that they take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Products:
    """Operations in products with weights, and in products between tokens (attention)."""

    weights: int
    attention: int

    @property
    def total(self) -> int:
        return self.weights + self.attention

    def backward(self, train_all: bool) -> int:
        """Operations of a backward pass: twice each product, or once for products with frozen
        weights."""
        return (2 if train_all else 1) * self.weights + 2 * self.attention


def operations_per_picture(
    products: Products,
    rollout: float,
    update: float,
    train_all: bool,
    recomputed: float,
    with_reference: bool,
    differentiated: float = 1.0,
) -> float:
    """Floating-point operations of the transformer for one image in one iteration.

    Args:
        rollout, update: model evaluations per image.
        train_all: whether all weights are trained, not only adapters.
        recomputed: fraction of the blocks that are recomputed in the backward pass.
        with_reference: whether a KL term also evaluates the reference policy.
        differentiated: fraction of the update's evaluations that have a backward pass.
    """
    forward = products.total * (1 + with_reference)
    backward = recomputed * products.total + products.backward(train_all)
    return rollout * products.total + update * (forward + differentiated * backward)


def seconds(operations: float, share: float, peak: float) -> float:
    """Seconds for these operations at a fraction ``share`` of a GPU's ``peak`` TFLOP/s."""
    return operations / (share * peak * 1e12)
