"""Estimates the memory on each GPU of a training run, by purpose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixgrpo.config import Config
from mixgrpo.planning.activations import (
    Precision,
    decoding_bytes,
    double_block_bytes,
    evaluation_bytes,
    kept_bytes,
)
from mixgrpo.planning.flux_size import FluxSize, read_settings
from mixgrpo.planning.parts import bytes_of, reward_bytes, text_bytes, vae_bytes
from mixgrpo.planning.spread import Spread

GIB = 2**30
CONTEXT = 2 * GIB  # used by CUDA and NCCL, or lost to fragmentation; an assumption
_VAE_WIDTH = 128  # FLUX.1-dev's block_out_channels[0]


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one GPU.

    Attributes:
        weights: the transformer's weights, trained and frozen.
        whole: additional weights in the products' dtype, gathered or cast by autocast.
        gradients, optimizer, average: those of the trained weights; gradients exist only during
            the update.
        stepping: working memory of an optimizer step that computes in another dtype than it stores.
        reference: the policy before training, for a KL term.
        states: the latents that a rollout keeps for the update.
        kept: activations kept by the update's forward and backward passes.
        evaluating: the larger of an evaluation without gradients and a decoding.
        rewards: reward models that stay on the device.
        visiting: reward models that are on the device only while they score.
        text, vae: the other parts of the model.
        context: used by CUDA and NCCL themselves.
    """

    weights: int
    whole: int
    gradients: int
    optimizer: int
    average: int
    reference: int
    states: int
    kept: int
    evaluating: int
    rewards: int
    visiting: int
    text: int
    vae: int
    stepping: int = 0
    context: int = CONTEXT

    @property
    def held(self) -> int:
        """Bytes held all the time."""
        trained = self.weights + self.optimizer + self.average + self.reference
        return trained + self.states + self.rewards + self.text + self.vae + self.context

    @property
    def peak(self) -> int:
        """Maximum over the phases: sampling with scoring, or the update."""
        sampling = self.evaluating + self.visiting
        updating = self.gradients + max(self.kept, self.stepping)
        return self.held + self.whole + max(sampling, updating)


def device_memory(config: Config, spread: Spread, gpus: int) -> DeviceMemory:
    """Estimates the memory of a run of this recipe on each of ``gpus``.

    The float32 weights that ZeRO keeps in addition count as part of the optimizer.
    """
    model, size = config.model, FluxSize.of_folder(Path(config.model.path))
    compute = bytes_of(model.compute_dtype)
    trained, frozen = _counts(config, size)
    value = 4 if model.weights == "float32" else 2
    resting = compute if spread.half else value
    spread_out = 0 if spread.offload else 1  # with offload, these are on the CPU
    pictures = -(-config.batch.prompts // gpus) * config.batch.samples
    tokens = (model.height // 16) * (model.width // 16)
    of_reward = reward_bytes(config)
    visits = config.scoring.placement == "offload"
    return DeviceMemory(
        weights=spread_out * (trained * resting + frozen * compute) // spread.weights,
        whole=_whole(config, size, trained, frozen, spread, resting),
        gradients=_gradients(size, trained, spread, resting),
        optimizer=spread_out * _optimizer(config, trained, spread) // spread.optimizer,
        average=trained * 4 // spread.weights if config.ema.decay else 0,
        reference=_reference(config, size, spread, compute, value),
        states=pictures * (2 * _window_size(config) + 2) * tokens * size.in_channels * 4,
        kept=_kept(config, size, tokens, Precision.on_gpu(compute, _seen(config, spread))),
        evaluating=_evaluating(config, size, tokens, Precision.on_gpu(compute, compute)),
        rewards=0 if visits else of_reward,
        visiting=of_reward if visits else 0,
        text=text_bytes(config),
        vae=vae_bytes(config),
        stepping=_stepping(config, size),
    )


def _window_size(config: Config) -> int:
    window = config.window
    if window.strategy != "all":
        return window.size
    first, end = window.envelope or (0, config.sampling.steps - 1)
    return end - first


def _counts(config: Config, size: FluxSize) -> tuple[int, int]:
    """Trained and frozen parameters."""
    if config.model.train == "full":
        return size.parameters, 0
    return size.adapters(config.model.lora_rank, config.model.lora_targets), size.parameters


def _whole(
    config: Config, size: FluxSize, trained: int, frozen: int, spread: Spread, resting: int
) -> int:
    model, compute = config.model, bytes_of(config.model.compute_dtype)
    if not spread.gathered:
        if resting == compute:
            return 0
        # Backward passes need what autocast has cast; a recomputed block casts anew.
        every = model.checkpoint_every if model.gradient_checkpointing else 0
        recomputed = 1 / every if every else 0.0
        at_work = min(trained, 2 * size.double_block * trained // size.parameters)
        return compute * int((1 - recomputed) * trained + recomputed * at_work)
    share = (trained + frozen) / size.parameters
    everything = int(size.parameters * share)
    # The current block and the next one, and the weights outside the blocks.
    some = int((2 * size.double_block + size.outside) * share)
    return compute * (everything if spread.gathered == "all" else some)


def _gradients(size: FluxSize, trained: int, spread: Spread, resting: int) -> int:
    if spread.sums_whole:
        return trained * 4
    value = 4 if spread.gathered else resting
    at_hand = 0 if spread.gradients == 1 else 2 * size.double_block * trained // size.parameters * 4
    return (0 if spread.offload else trained * value // spread.gradients) + at_hand


def _optimizer(config: Config, trained: int, spread: Spread) -> int:
    moments = 2 if config.update.optimizer == "adamw_8bit" else 8
    return trained * (moments + (4 if spread.half else 0))


def _stepping(config: Config, size: FluxSize) -> int:
    """Float32 weight, gradient, moments, codes and random numbers of the largest weight."""
    if config.update.optimizer == "adamw" and config.model.weights == "float32":
        return 0
    full = config.model.train == "full"
    largest = 6 * size.width**2 if full else config.model.lora_rank * 6 * size.width
    return 10 * 4 * largest


def _reference(config: Config, size: FluxSize, spread: Spread, compute: int, value: int) -> int:
    """Bytes of the reference policy in full training; LoRA switches its adapters off instead."""
    if not config.update.kl or config.model.train == "lora":
        return 0
    if spread.weights == 1:
        return size.parameters * value
    whole = size.parameters * compute if spread.gathered == "all" else 0
    return size.parameters * compute // spread.weights + whole


def _seen(config: Config, spread: Spread) -> int:
    """Bytes per weight in matrix products."""
    cast = bool(spread.gathered) or spread.half or config.model.train == "lora"
    cast = cast or config.model.weights != "float32"
    return bytes_of(config.model.compute_dtype) if cast else 4


def _kept(config: Config, size: FluxSize, tokens: int, precision: Precision) -> int:
    model = config.model
    every = model.checkpoint_every if model.gradient_checkpointing else 0
    kept = kept_bytes(
        size,
        tokens,
        model.text_length,
        config.update.micro_batch,
        precision,
        model.train == "full",
        every,
    )
    # The backward pass of a block needs about as much working memory as an evaluation.
    at_work = evaluation_bytes(
        size, tokens + model.text_length, config.update.micro_batch, precision.product
    )
    return kept + at_work


def _evaluating(config: Config, size: FluxSize, tokens: int, precision: Precision) -> int:
    model, sampling, compute = config.model, config.sampling, precision.product
    together = tokens + model.text_length
    evaluation = evaluation_bytes(size, together, sampling.micro_batch, compute)
    if model.compile != "off":  # a compiled block keeps what its backward pass would need
        width = sampling.micro_batch * together * size.width
        evaluation += width * double_block_bytes(precision, model.train == "full")
    batch = min(sampling.decode_batch, sampling.micro_batch)
    return max(
        evaluation,
        decoding_bytes(model.height * model.width, batch, first_width(Path(model.path)), compute),
    )


def first_width(model: Path) -> int:
    """First width of a model folder's decoder; that of FLUX.1-dev if there is no folder."""
    path = model / "vae" / "config.json"
    if not path.is_file():
        return _VAE_WIDTH
    widths = read_settings(path).get("block_out_channels")
    if not (isinstance(widths, list) and widths and isinstance(widths[0], int)):
        raise ValueError(f"{path} has block_out_channels {widths}, which cannot be; fetch it again")
    return widths[0]
