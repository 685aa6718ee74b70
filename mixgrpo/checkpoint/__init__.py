"""Checkpoints: written atomically by all processes, and restored exactly by any number of them.

A checkpoint is a folder ``iteration_00000025`` with one file for each part of the state and each
process (``model_00000.distcp``, ``ema_...``, ``optimizer_...``, in the format of
torch.distributed.checkpoint), its index ``.metadata``, and ``state.json`` with the position, the
configuration, and the size and digest of every file. It is written under a temporary name, flushed
and renamed; only then is ``latest`` updated to name it.
"""

from mixgrpo.checkpoint.choice import choose, find
from mixgrpo.checkpoint.folder import CheckpointError, latest
from mixgrpo.checkpoint.manifest import Damaged, Position, Saved, open_saved, verify
from mixgrpo.checkpoint.saver import Saver
from mixgrpo.checkpoint.shards import Shards

__all__ = [
    "CheckpointError",
    "Damaged",
    "Position",
    "Saved",
    "Saver",
    "Shards",
    "choose",
    "find",
    "latest",
    "open_saved",
    "verify",
]
