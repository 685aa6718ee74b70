"""Checkpoints: written whole or not at all, by all processes, and read back exactly by any number.

A checkpoint is a folder ``iteration_00000025`` with one file for each part of the state and each
process (``model_00000.distcp``, ``ema_...``, ``optimizer_...``; torch.distributed.checkpoint's
format), its index ``.metadata``, and ``state.json``: position, configuration, and every file's
size and digest. It is written under another name, flushed, renamed, and only then does ``latest``
name it.
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
