"""Sizes of a model's other parts and of rewards, from their files or else as published."""

from __future__ import annotations

from pathlib import Path

from mixgrpo.config import Config, RewardConfig
from mixgrpo.files.weight_sets import find_shards
from mixgrpo.planning.decoder import decoder_of
from mixgrpo.planning.settings import family_for

# Parameters of the rewards' published files: ViT-H/14 (three times), and BLIP-L with BERT.
PUBLISHED = {
    "hpsv2": 986_109_441,
    "pickscore": 985_509_377,
    "clip_score": 986_660_225,
    "imagereward": 446_000_000,
}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def bytes_of(dtype: str) -> int:
    """Bytes of one value."""
    return _BYTES[dtype]


def count_parameters(folder: Path, missing: int = 0) -> int:
    """Parameters of the weights that loading the folder would read, from the headers of its files.

    Args:
        missing: the result if there are no weights, or not all of them.

    Raises:
        OSError, ValueError: see ``find_shards`` and ``read_shapes``.
    """
    from mixgrpo.files.weight_files import read_shapes

    try:
        return sum(weight.numel() for weight in read_shapes(find_shards(folder)).values())
    except FileNotFoundError:
        return missing


def text_bytes(config: Config) -> int:
    """Bytes of the text encoders if they stay on the device."""
    if config.text.mode == "embeddings" or config.text.placement != "device":
        return 0
    folder, published = Path(config.model.path), family_for(config.model).published.encoders
    count = sum(count_parameters(folder / part, missing) for part, missing in published.items())
    return count * bytes_of(config.model.compute_dtype)


def vae_bytes(config: Config) -> int:
    """Bytes of the autoencoder's weights."""
    missing = decoder_of(config.model).parameters
    count = count_parameters(Path(config.model.path) / "vae", missing)
    return count * bytes_of(config.model.compute_dtype)


def reward_bytes(config: Config) -> int:
    """Bytes of the reward models that are on the device, always or only while they score.

    Held-out rewards are included, since they are loaded for validations together with the others.

    Raises:
        OSError, ValueError: a reward's option dtype is none of those allowed; see also
            ``count_parameters``.
    """
    if config.scoring.placement == "cpu":
        return 0
    return sum(_one_reward(name, knobs) for name, knobs in config.rewards.items())


def _one_reward(name: str, knobs: RewardConfig) -> int:
    if knobs.kind not in PUBLISHED:
        return 0  # small, on a server, or the user's own
    dtype = knobs.options.get("dtype", "float32")
    if dtype not in tuple(_BYTES):  # a tuple, since an option may be a list
        raise ValueError(
            f"rewards.{name}.options.dtype is {dtype!r}; set it to one of {', '.join(_BYTES)}"
        )
    return _reward_parameters(knobs) * bytes_of(dtype)


def _reward_parameters(knobs: RewardConfig) -> int:
    folder = Path(knobs.model or "")
    if not (knobs.model and folder.is_dir()):
        return PUBLISHED[knobs.kind]
    try:
        return count_parameters(folder, PUBLISHED[knobs.kind])
    except ValueError:  # the reward itself may read one file of several
        return PUBLISHED[knobs.kind]
