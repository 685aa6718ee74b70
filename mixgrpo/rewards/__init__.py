"""Rewards: one file per reward, a registry by name, and ``score``, which evaluates them all.

``hpsv2``, ``clip_score``, ``pickscore`` and ``imagereward`` run on batched tensors on the device,
without a round trip through PIL. ``jpeg_size`` and ``ocr`` run on the CPU, and ``vlm`` queries a
server. A custom reward is named ``package.module:callable``.
"""

from mixgrpo.rewards.protocol import Reward, depends_on_metadata, takes_metadata
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
    "depends_on_metadata",
    "find_reward",
    "resident",
    "score",
    "takes_metadata",
]
