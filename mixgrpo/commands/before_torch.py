"""Settings in the environment that torch reads when it is imported."""

from __future__ import annotations

import os

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prepare() -> None:
    """Makes all settings that the user has not made; to be called before torch is imported."""
    set_wait_policy()
    set_allocator()


def set_wait_policy() -> None:
    """Lets idle threads leave the cores to others soon; does nothing if the user chose a policy.

    By default they spin for milliseconds, and take the cores from everything else that runs: two
    trainings on two cores become more than twice as slow as they need be. Where several processes
    of a run share the cores, threads sleep at once (``OMP_WAIT_POLICY=passive``). That costs a
    process which has the cores to itself a third of its speed, so there threads spin for
    microseconds first (``GOMP_SPINCOUNT``, of GNU's OpenMP, which torch's packages use).
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    # Not parsed as a number: a wrong value is reported where the processes join.
    if os.environ.get("LOCAL_WORLD_SIZE", "1") not in ("", "0", "1"):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    else:
        os.environ["GOMP_SPINCOUNT"] = "1000"


def set_allocator() -> None:
    """Lets a GPU's memory be reused between rollout and update, whose tensors differ in size.

    With segments that can grow, memory that one phase has freed serves the other one whatever the
    sizes; with torch's default, much of it can be reserved and still unusable.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
