"""The files that a run on a published model needs, and their download with the ``hf`` program."""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mixgrpo.downloads.hpdv2 import write_prompts

_REFUSED = (
    "access denied",
    "requires approval",
    "gated",
    "401",
    "403",
    "not logged in",
    "unauthorized",
    "invalid user token",
)


class DownloadError(Exception):
    """A download cannot continue; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """Files of one repository, and their local folder.

    Attributes:
        include: glob patterns of the files to download.
        dataset: whether the repository is a data set, not a model.
    """

    repository: str
    folder: str
    include: tuple[str, ...]
    dataset: bool = False

    def command(self, *options: str) -> list[str]:
        kind = ["--repo-type", "dataset"] if self.dataset else []
        patterns = [word for pattern in self.include for word in ("--include", pattern)]
        place = ["--local-dir", self.folder]
        return ["hf", "download", self.repository, *kind, *patterns, *place, *options]

    @property
    def page(self) -> str:
        return f"https://huggingface.co/{'datasets/' if self.dataset else ''}{self.repository}"


@dataclass(frozen=True)
class Item:
    """What one name on the command line stands for.

    Attributes:
        gigabytes: size of all its files, in 10^9 bytes.
        brings: paths that exist once it has been downloaded.
        finish: converts the downloaded files into those that are used; returns warnings.
    """

    what: str
    gigabytes: float
    sources: tuple[Source, ...]
    brings: tuple[str, ...]
    finish: Callable[[], list[str]] | None = None


_FLUX_PARTS = (
    *("transformer", "vae", "text_encoder", "text_encoder_2"),
    *("tokenizer", "tokenizer_2", "scheduler"),
)
_QWEN_IMAGE_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.*")

ITEMS = {
    # The repository also holds the same weights as flux1-dev.safetensors (24 GB) and
    # ae.safetensors, which are not downloaded.
    "flux": Item(
        "FLUX.1-dev as a diffusers folder",
        33.8,
        (
            Source(
                "black-forest-labs/FLUX.1-dev",
                "data/models/FLUX.1-dev",
                ("model_index.json", "LICENSE.md", *(f"{part}/*" for part in _FLUX_PARTS)),
            ),
        ),
        tuple(f"data/models/FLUX.1-dev/{part}" for part in ("model_index.json", *_FLUX_PARTS)),
    ),
    # Nine shards of the transformer take 40.9 GB, four of the text encoder 16.6 GB.
    "qwen_image": Item(
        "Qwen-Image as a diffusers folder",
        57.7,
        (
            Source(
                "Qwen/Qwen-Image",
                "data/models/Qwen-Image",
                ("model_index.json", "LICENSE", *(f"{part}/*" for part in _QWEN_IMAGE_PARTS)),
            ),
        ),
        tuple(
            f"data/models/Qwen-Image/{part}" for part in ("model_index.json", *_QWEN_IMAGE_PARTS)
        ),
    ),
    "hpsv2": Item(
        "HPS-v2.1",
        2.0,
        (Source("xswu/HPSv2", "data/models/hpsv2", ("HPS_v2.1_compressed.pt",)),),
        ("data/models/hpsv2/HPS_v2.1_compressed.pt",),
    ),
    # The repository holds the weights in two formats; one is enough.
    "pickscore": Item(
        "PickScore, and the processor of the CLIP model that it is based on",
        4.0,
        (
            Source(
                "yuvalkirstain/PickScore_v1",
                "data/models/pickscore",
                ("config.json", "model.safetensors"),
            ),
            Source(
                "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
                "data/models/pickscore_processor",
                ("preprocessor_config.json", "merges.txt", *_TOKENIZER),
            ),
        ),
        (
            "data/models/pickscore/config.json",
            "data/models/pickscore/model.safetensors",
            "data/models/pickscore_processor/preprocessor_config.json",
            "data/models/pickscore_processor/tokenizer.json",
        ),
    ),
    "imagereward": Item(
        "ImageReward, and the tokenizer of bert-base-uncased",
        1.8,
        (
            Source(
                "THUDM/ImageReward",
                "data/models/imagereward",
                ("ImageReward.pt", "med_config.json"),
            ),
            Source("google-bert/bert-base-uncased", "data/models/imagereward", _TOKENIZER),
        ),
        tuple(
            f"data/models/imagereward/{file}"
            for file in ("ImageReward.pt", "med_config.json", "vocab.txt")
        ),
    ),
    # Papers cite apple/DFN5B-CLIP-ViT-H-14-384; this is the name that open_clip loads it by.
    "clip": Item(
        "the model of CLIP score, DFN5B ViT-H/14",
        4.0,
        (
            Source(
                "apple/DFN5B-CLIP-ViT-H-14-378",
                "data/models/clip",
                ("open_clip_pytorch_model.bin", "open_clip_config.json"),
            ),
        ),
        ("data/models/clip/open_clip_pytorch_model.bin",),
    ),
    "prompts": Item(
        "the prompts of HPDv2: 103,700 for training, 400 for testing",
        0.2,
        (Source("ymhao/HPDv2", "data/hpdv2", ("train.json", "test.json"), dataset=True),),
        ("data/prompts_hpdv2.txt", "data/prompts_hpdv2_test.txt"),
        finish=lambda: write_prompts(Path("data/hpdv2"), Path("data")),
    ),
    # Its precision, and so its size, is unknown: 48 GB in float32, half of that in bfloat16.
    "mixgrpo": Item(
        "the transformer published with the MixGRPO paper",
        48.0,
        (
            Source(
                "tulvgengenr/MixGRPO",
                "data/models/MixGRPO",
                ("diffusion_pytorch_model.safetensors",),
            ),
        ),
        ("data/models/MixGRPO/diffusion_pytorch_model.safetensors",),
    ),
}


def check_program() -> None:
    """Raises DownloadError if ``hf`` is not installed."""
    if shutil.which("hf") is None:
        raise DownloadError(
            "there is no program `hf`, which is part of huggingface_hub; run `bash env_setup.sh`"
        )


def check_disk(items: Iterable[Item]) -> None:
    """Raises DownloadError if the items' missing files do not fit on the disk."""
    needed: dict[int, float] = defaultdict(float)
    places: dict[int, Path] = {}
    for item in items:
        folder = Path(item.sources[0].folder)
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        device = place.stat().st_dev
        there = sum(_size(Path(name)) for name in {source.folder for source in item.sources})
        needed[device] += max(0.0, item.gigabytes * 1e9 - there)
        places[device] = place
    for device, place in places.items():
        free = shutil.disk_usage(place).free
        if needed[device] > free:
            raise DownloadError(
                f"{needed[device] / 1e9:.1f} GB are still to be downloaded, but the disk of "
                f"{str(place)!r} has only {free / 1e9:.1f} GB free; free some space, or make "
                "data/models a link to a folder on a larger disk"
            )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fetch(item: Item) -> list[str]:
    """Downloads the missing files of an item; returns warnings.

    Existing files are kept, and interrupted downloads are resumed.

    Raises:
        DownloadError: access is refused, or ``hf`` fails.
    """
    for source in item.sources:
        _check_access(source)
        if subprocess.run(source.command(), check=False).returncode != 0:
            raise DownloadError(
                f"downloading {source.repository} failed (see the message of `hf` above); fix the "
                "cause and run the same command again, which keeps what has been downloaded"
            )
    warnings = item.finish() if item.finish else []
    for path in item.brings:
        if not Path(path).exists():
            raise DownloadError(
                f"{path!r} is not among the files of {item.sources[0].repository}; check at "
                f"{item.sources[0].page} whether its files have been renamed"
            )
    return warnings


def _check_access(source: Source) -> None:
    """Lists what would be downloaded, so that a refused access is reported before any download."""
    asked = subprocess.run(source.command("--dry-run"), check=False, capture_output=True, text=True)
    if asked.returncode == 0:
        return
    said = asked.stderr.strip() or asked.stdout.strip()
    if any(word in said.lower() for word in _REFUSED):
        raise DownloadError(
            f"access to {source.repository} is refused; accept its licence at {source.page}, then "
            "log in with `hf auth login` or set HF_TOKEN to a valid token"
        )
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines[-1:]
    reason = errors[-1].strip() if errors else f"exit code {asked.returncode}"
    raise DownloadError(
        f"{source.repository} cannot be downloaded ({reason}); check the network and run the same "
        "command again, which keeps what has been downloaded"
    )
