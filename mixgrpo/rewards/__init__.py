"""Rewards: one file per reward, a registry by name, and ``score`` to run them all.

The published rewards run on batched tensors on the device, without a round trip through PIL:
``hpsv2``, ``clip_score``, ``pickscore``, ``imagereward``, ``jpeg_size``; so does ``ocr``, on the
CPU; ``vlm`` asks a server; a user's own is named ``package.module:callable``.
"""

from mixgrpo.rewards.protocol import Reward
from mixgrpo.rewards.registry import build_reward, find_reward
from mixgrpo.rewards.scoring import RewardError, Scoring, check_failures, score
from mixgrpo.rewards.stream import ScoreStream, resident

__all__ = [
    "Reward",
    "RewardError",
    "ScoreStream",
    "Scoring",
    "build_reward",
    "check_failures",
    "find_reward",
    "resident",
    "score",
]
