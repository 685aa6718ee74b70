"""The operations of an iteration, and the time that they take."""

from __future__ import annotations

from mixgrpo.planning.flux_size import Products


def operations_per_picture(
    products: Products,
    rollout: float,
    update: float,
    train_all: bool,
    recomputed: float,
    with_reference: bool,
) -> float:
    """Floating-point operations of an iteration for one picture, the transformer's alone.

    Args:
        rollout, update: evaluations per picture.
        train_all: all weights are trained, not just adapters.
        recomputed: share of the blocks whose activations are computed again in the backward pass.
        with_reference: a KL evaluates the reference policy too.
    """
    forward = products.total * (1 + recomputed + with_reference)
    return rollout * products.total + update * (forward + products.backward(train_all))


def seconds(operations: float, share: float, peak: float) -> float:
    """Of that many operations at a share of a GPU's ``peak`` TFLOP/s."""
    return operations / (share * peak * 1e12)
