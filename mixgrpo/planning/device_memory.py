"""Estimates the memory on each GPU of a training run, by purpose."""

from __future__ import annotations

from dataclasses import dataclass

from mixgrpo.config import Config
from mixgrpo.planning.branches import Branches
from mixgrpo.planning.decoder import decoder_of
from mixgrpo.planning.network import Network, Size, Trained, network_of
from mixgrpo.planning.parts import bytes_of, reward_bytes, text_bytes, vae_bytes
from mixgrpo.planning.spread import Spread

GIB = 2**30
CONTEXT = 2 * GIB  # used by CUDA and NCCL, or lost to fragmentation; an assumption


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
    model, network = config.model, network_of(config.model)
    compute = bytes_of(model.compute_dtype)
    trained, frozen = network.counts(model)
    value = 4 if model.weights == "float32" else 2
    resting = compute if spread.half else value
    spread_out = 0 if spread.offload else 1  # with offload, these are on the CPU
    pictures = -(-config.batch.prompts // gpus) * config.batch.samples
    tokens, channels = network.latent_shape(Size.of(model))
    of_reward = reward_bytes(config)
    visits = config.scoring.placement == "offload"
    return DeviceMemory(
        weights=spread_out * (trained * resting + frozen * compute) // spread.weights,
        whole=_whole(config, network, spread, resting),
        gradients=_gradients(network, trained, spread, resting)
        + Branches.of(config).waiting * trained * _value_of_gradients(spread, compute, resting),
        optimizer=spread_out * _optimizer(config, trained, spread) // spread.optimizer,
        average=trained * 4 // spread.weights if config.ema.decay else 0,
        reference=_reference(config, network, spread, compute, value),
        states=pictures * (2 * _window_size(config) + 2) * tokens * channels * 4,
        kept=_kept(config, network, _seen(config, spread)),
        evaluating=_evaluating(config, network),
        rewards=0 if visits else of_reward,
        visiting=of_reward if visits else 0,
        text=text_bytes(config),
        vae=vae_bytes(config),
        stepping=_stepping(config, network),
    )


def _window_size(config: Config) -> int:
    window = config.window
    if window.strategy != "all":
        return window.size
    first, end = window.envelope or (0, config.sampling.steps - 1)
    return end - first


def _whole(config: Config, network: Network, spread: Spread, resting: int) -> int:
    model, compute = config.model, bytes_of(config.model.compute_dtype)
    trained, frozen = network.counts(model)
    blocks = 2 * network.largest_block
    if not spread.gathered:
        if resting == compute:
            return 0
        # Backward passes need what autocast has cast; a recomputed block casts anew.
        every = model.checkpoint_every if model.gradient_checkpointing else 0
        recomputed = 1 / every if every else 0.0
        at_work = min(trained, blocks * trained // network.parameters)
        return compute * int((1 - recomputed) * trained + recomputed * at_work)
    share = (trained + frozen) / network.parameters
    everything = int(network.parameters * share)
    # The current block and the next one, and the weights outside the blocks.
    some = int((blocks + network.outside) * share)
    return compute * (everything if spread.gathered == "all" else some)


def _gradients(network: Network, trained: int, spread: Spread, resting: int) -> int:
    if spread.sums_whole:
        return trained * 4
    value = 4 if spread.gathered else resting
    blocks = 2 * network.largest_block * trained // network.parameters
    at_hand = 0 if spread.gradients == 1 else blocks * 4
    return (0 if spread.offload else trained * value // spread.gradients) + at_hand


def _value_of_gradients(spread: Spread, compute: int, resting: int) -> int:
    """Bytes of a value of the gradients that a backward pass computes.

    Where a weight is used by two branches, autograd holds the whole gradient of one, before any
    engine shards it, until it can add that of the other.
    """
    return compute if spread.gathered or spread.half else resting


def _optimizer(config: Config, trained: int, spread: Spread) -> int:
    moments = 2 if config.update.optimizer == "adamw_8bit" else 8
    return trained * (moments + (4 if spread.half else 0))


def _stepping(config: Config, network: Network) -> int:
    """Float32 weight, gradient, moments, codes and random numbers of the largest weight."""
    if config.update.optimizer == "adamw" and config.model.weights == "float32":
        return 0
    model = config.model
    if model.train == "full":
        return 10 * 4 * network.largest_weight
    return 10 * 4 * max(network.adapted(model.lora_rank, model.lora_targets))


def _reference(config: Config, network: Network, spread: Spread, compute: int, value: int) -> int:
    """Bytes of the reference policy in full training; LoRA switches its adapters off instead."""
    if not config.update.kl or config.model.train == "lora":
        return 0
    if spread.weights == 1:
        return network.parameters * value
    whole = network.parameters * compute if spread.gathered == "all" else 0
    return network.parameters * compute // spread.weights + whole


def _seen(config: Config, spread: Spread) -> str:
    """Dtype of trained weights in matrix products, before autocast casts them."""
    cast = bool(spread.gathered) or spread.half or config.model.train == "lora"
    cast = cast or config.model.weights != "float32"
    return config.model.compute_dtype if cast else "float32"


def _trained(config: Config, weights: str) -> Trained:
    model = config.model
    return Trained(model.train, model.lora_rank, model.lora_targets, weights, model.compute_dtype)


def _kept(config: Config, network: Network, weights: str) -> int:
    model, branches, size = config.model, Branches.of(config), Size.of(config.model)
    every = model.checkpoint_every if model.gradient_checkpointing else 0
    kept = network.kept(size, _trained(config, weights)).peak(every)
    # The backward pass of a block needs about as much working memory as an evaluation.
    at_work = network.evaluation(size, model.compute_dtype)
    return config.update.micro_batch * (branches.kept * kept + branches.updated * at_work)


def _evaluating(config: Config, network: Network) -> int:
    model, sampling, size = config.model, config.sampling, Size.of(config.model)
    evaluation = network.evaluation(size, model.compute_dtype)
    if model.compile != "off":  # a compiled block keeps what its backward pass would need
        evaluation += max(network.kept(size, _trained(config, model.compute_dtype)).blocks)
    _, channels = network.latent_shape(size)
    decoding = decoder_of(model).activations(
        model.height, model.width, channels, model.compute_dtype
    )
    return max(
        sampling.micro_batch * Branches.of(config).sampled * evaluation,
        min(sampling.decode_batch, sampling.micro_batch) * decoding,
    )
