"""Sizes of a model's other parts and of rewards, from their files or else as published."""

from __future__ import annotations

from pathlib import Path

from mixgrpo.config import Config, RewardConfig

# Parameters of the published files: FLUX.1-dev's T5-XXL encoder and CLIP-L, its autoencoder, and
# for the rewards ViT-H/14 (three times) and BLIP-L with BERT.
PUBLISHED = {
    "text_encoder*": 4_762_310_656 + 123_060_480,
    "vae": 83_819_683,
    "hpsv2": 986_109_441,
    "pickscore": 985_509_377,
    "clip_score": 986_660_225,
    "imagereward": 446_000_000,
}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def bytes_of(dtype: str) -> int:
    """Bytes of one value."""
    return _BYTES[dtype]


def parameters_of(model: Path, part: str) -> int:
    """Parameters of a part of a model folder, read from file headers, or else as published."""
    files = sorted(model.glob(f"{part}/*.safetensors"))
    if not files:
        return PUBLISHED[part]
    from mixgrpo.files.weight_files import read_shapes

    return sum(weight.numel() for file in files for weight in read_shapes([file]).values())


def text_bytes(config: Config) -> int:
    """Bytes of the text encoders if they stay on the device."""
    if config.text.mode == "embeddings" or config.text.placement != "device":
        return 0
    count = parameters_of(Path(config.model.path), "text_encoder*")
    return count * bytes_of(config.model.compute_dtype)


def vae_bytes(config: Config) -> int:
    """Bytes of the autoencoder's weights."""
    count = parameters_of(Path(config.model.path), "vae")
    return count * bytes_of(config.model.compute_dtype)


def reward_bytes(config: Config) -> int:
    """Bytes of the reward models that are on the device, always or only while they score.

    Held-out rewards are included, since they are loaded for validations together with the others.
    """
    if config.scoring.placement == "cpu":
        return 0
    return sum(_one_reward(knobs) for knobs in config.rewards.values())


def _one_reward(knobs: RewardConfig) -> int:
    if knobs.kind not in PUBLISHED:
        return 0  # small, on a server, or the user's own
    return _reward_parameters(knobs) * bytes_of(knobs.options.get("dtype", "float32"))


def _reward_parameters(knobs: RewardConfig) -> int:
    folder = Path(knobs.model or "")
    if knobs.model and folder.is_dir() and list(folder.glob("*.safetensors")):
        return parameters_of(folder.parent, folder.name)
    return PUBLISHED[knobs.kind]
