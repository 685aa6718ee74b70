"""Generates images from prompts: noise, tuned steps, base steps, decoding, files.

Each image's noise depends only on the seed, its prompt's position in the file and its sample index,
and the batches are fixed, so that any number of processes generates the same images.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mixgrpo.config import flatten
from mixgrpo.devices import is_out_of_memory
from mixgrpo.engines.distributed import Process, process_group
from mixgrpo.files.disk import own_folder
from mixgrpo.files.fingerprint import fingerprint, fingerprint_files
from mixgrpo.files.revision import git_revision
from mixgrpo.inference.config import InferenceConfig, check, model_config, tuned_steps
from mixgrpo.inference.folder import Picture, PictureFolder
from mixgrpo.inference.memory import explain
from mixgrpo.inference.tuned import Tuned, find_tuned, load_tuned
from mixgrpo.maths.schedule import make_sigmas
from mixgrpo.models import Policy
from mixgrpo.models.folder import check_folder, require_parts
from mixgrpo.models.guidance import Guidance
from mixgrpo.models.lora_files import settings_beside
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.models.registry import family_of
from mixgrpo.models.spacing import spacing_of
from mixgrpo.noise import Noise
from mixgrpo.planning.memory import OutOfMemory, memory_of
from mixgrpo.rollout import sample_ode
from mixgrpo.run.pictures import to_bytes
from mixgrpo.text.negative import GuidedText, negative_for, negative_prompts
from mixgrpo.text.prompt_files import PromptList
from mixgrpo.text.prompts import read_prompts
from mixgrpo.types import TextEmbedding

Block = list[Picture]  # images that go through the model together


def sample(config: InferenceConfig) -> Path:
    """Generates the missing images, with all processes together; returns the folder.

    Raises:
        ValueError, FileNotFoundError: an error that the user can fix, before the model is loaded
            or, for tuned weights of another model, right after.
        OutOfMemory: the GPU's memory is too small.
    """
    check(config)
    prompts = read_prompts(config.prompts_file, "prompts_file")
    folder = PictureFolder(config, settings_of(config, prompts), prompts)
    _negative(config)  # says what is wrong before the folder is made
    check_folder(family_of(config.model), Path(config.model.path))  # before the folder is made
    with (
        process_group(config.threads) as process,
        _explained(config, process),
        process.first(own_folder(config.folder, "folder")),
    ):
        folder.check()
        blocks = _mine(_unfinished(folder, config.micro_batch), process)
        wait = _barrier(process)
        wait()  # every process must have listed the folder before its contents change
        if process.rank == 0:
            folder.write_manifest()
        try:
            if blocks:
                _draw(config, folder, blocks, process)
            wait()
        finally:
            if process.rank == 0:
                folder.write_manifest()
    return folder.path


def settings_of(config: InferenceConfig, prompts: PromptList) -> dict[str, object]:
    """The settings that the manifest records, dotted path -> value.

    Of the prompts' metadata only negative prompts are among them: images depend on nothing else.
    """
    model = "".join(
        map(fingerprint, require_parts(config.model.path, family_of(config.model).parts))
    )
    weights = find_tuned(config)
    tuned = weights + settings_beside(weights)
    return {
        **flatten(config),
        "fingerprints.model": _digest(model),
        "fingerprints.checkpoint": fingerprint_files(tuned) if tuned else None,
        # A prompt of JSONL may contain line breaks, but no prompt contains NUL.
        "fingerprints.prompts": _digest("\n".join(p.replace("\n", "\0") for p in prompts.texts)),
        **_negatives(config, prompts),
        "revision": git_revision(),
    }


def _negatives(config: InferenceConfig, prompts: PromptList) -> dict[str, object]:
    default = _negative(config)
    if default is None:
        return {}
    negatives = negative_prompts(prompts.metadata, default)
    return {"fingerprints.negative_prompts": _digest("\0".join(negatives))}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _unfinished(folder: PictureFolder, size: int) -> list[Block]:
    """Blocks with missing images; block boundaries are fixed, so that batches do not change."""
    every = folder.pictures
    blocks = [every[start : start + size] for start in range(0, len(every), size)]
    return [block for block in blocks if not all(map(folder.is_there, block))]


def _mine(blocks: list[Block], process: Process) -> list[Block]:
    return blocks[process.rank :: process.world_size]


# ---- generation


@dataclass(frozen=True)
class Part:
    """Steps ``start .. stop-1``, computed by the model that ``enter`` activates."""

    enter: Callable[[], None]
    start: int
    stop: int


def _parts(tuned: Tuned, config: InferenceConfig) -> list[Part]:
    change = tuned_steps(config)
    parts = [Part(tuned.apply, 0, change), Part(tuned.remove, change, config.steps)]
    return [part for part in parts if part.start < part.stop]


def _draw(
    config: InferenceConfig, folder: PictureFolder, blocks: list[Block], process: Process
) -> None:
    knobs = model_config(config)
    policy = DiffusersPolicy.frozen(knobs, process.device)
    tuned = load_tuned(policy.module, config)
    parts = _parts(tuned, config)
    painter = _Painter(config, policy, folder, _negative(config))
    if process.rank == 0:
        for note in tuned.notes:
            tqdm.write(f"note: {note}")
        _warn_of_truncation(policy, folder.prompts.texts)
    # If switching the weights is expensive, it is done once: all blocks finish the tuned steps, and
    # are kept as latents, before the first base step.
    groups = [blocks] if tuned.dear and len(parts) > 1 else [[block] for block in blocks]
    quiet = process.rank > 0 or not config.progress
    total = config.steps * sum(map(len, blocks))
    with tqdm(total=total, unit="step", dynamic_ncols=True, disable=quiet) as bar:
        for group in groups:
            latents: list[Tensor | None] = [None] * len(group)
            for part in parts:
                part.enter()
                for place, block in enumerate(group):
                    latents[place] = painter.advance(block, latents[place], part)
                    bar.update(len(block) * (part.stop - part.start))


class _Painter:
    """Turns blocks of images from noise into files."""

    def __init__(
        self,
        config: InferenceConfig,
        policy: Policy,
        folder: PictureFolder,
        negative: str | None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.folder = folder
        spacing = spacing_of(model_config(config), config.shift, config.steps)
        self.sigmas = make_sigmas(config.steps, spacing)
        guidance = Guidance(config.guidance.scale, config.guidance.batched)
        self.velocity = policy.velocity(policy.module, guidance)
        self.text = GuidedText(policy, negative)

    @torch.no_grad()
    def advance(self, block: Block, latents: Tensor | None, part: Part) -> Tensor | None:
        """The block's latents after a part, on the CPU; None once the images are written."""
        x = self._noise(block) if latents is None else latents
        text = self._encode(block)
        x = sample_ode(
            self.velocity,
            x.to(text.tokens.device),
            text,
            self.sigmas[part.start : part.stop + 1],
            self.config.micro_batch,
        )
        if part.stop < self.config.steps:
            return x.cpu()
        self._finish(block, x)
        return None

    def _noise(self, block: Block) -> Tensor:
        """[N, S, C]. The first sample's noise is the noise that a run's validation uses."""
        drawn = [
            Noise(
                seed=self.config.seed,
                iteration=picture.sample,
                prompts=[picture.index],
                samples=1,
                shape=self.policy.latent_shape,
                shared=True,
                device=torch.device("cpu"),
            ).initial()
            for picture in block
        ]
        return torch.cat(drawn)

    def _encode(self, block: Block) -> TextEmbedding:
        first = block[0].index  # a block's prompts are consecutive
        part, prompts = slice(first, block[-1].index + 1), self.folder.prompts
        text = self.text.encode(prompts.texts[part], prompts.metadata[part])
        rows = torch.tensor([picture.index - first for picture in block])
        return text[rows]

    def _finish(self, block: Block, latents: Tensor) -> None:
        if not latents.isfinite().all():
            raise ValueError(
                f"{self.config.checkpoint or self.config.model.path} produces images that are not "
                "finite; its weights are damaged or diverged, so use other weights"
            )
        parts = latents.split(self.config.decode_batch)
        images = torch.cat([to_bytes(self.policy.decode(part)).cpu() for part in parts])
        for picture, image in zip(block, images, strict=True):
            if not self.folder.is_there(picture):
                self.folder.save(picture, image)


def _negative(config: InferenceConfig) -> str | None:
    knobs = config.guidance
    return negative_for(
        model_config(config), {"guidance.scale": knobs.scale}, knobs.negative_prompt
    )


def _warn_of_truncation(policy: Policy, prompts: Sequence[str]) -> None:
    truncated = policy.count_truncated(prompts)
    if truncated:
        tqdm.write(
            f"warning: {truncated} of {len(prompts)} prompts exceed the text encoder's maximum "
            "length and are truncated"
        )


# ---- several processes, and running out of memory


def _barrier(process: Process) -> Callable[[], None]:
    """A barrier on the CPU, so that waiting for a lost process does not block a GPU."""
    if process.world_size == 1:
        return lambda: None
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    return lambda: dist.barrier(group)


@contextlib.contextmanager
def _explained(config: InferenceConfig, process: Process) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(explain(config, memory_of(process.device))) from error
