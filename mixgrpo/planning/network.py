"""A family's transformer without memory: its parameters, operations and activations.

Repeated blocks cost the same, so that two of each kind are evaluated, on the meta device: beside
its own, the second keeps nothing that the first keeps already.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mixgrpo.config import ModelConfig
from mixgrpo.models.compiled import repeated_blocks
from mixgrpo.models.family import Family
from mixgrpo.planning.meter import LikeGpu, Meter
from mixgrpo.planning.operations import Products
from mixgrpo.planning.settings import Model, cannot_be, family_for, make_part, settings_of
from mixgrpo.types import TextEmbedding

if TYPE_CHECKING:
    from mixgrpo.models.policy import DiffusersPolicy

# Evaluated together. A single image keeps less than each of several, whose parts are not
# contiguous and are copied for matrix products.
_IMAGES = 2
# What is reserved for activations, in multiples of their size, since the gaps between them are not
# large enough for the next; an assumption.
_UNUSABLE = 1.15


class Size(NamedTuple):
    """What is evaluated: height and width of an image in pixels, and tokens of its prompt."""

    height: int
    width: int
    text_length: int

    @classmethod
    def of(cls, model: Any) -> Size:
        """Of knobs with these names."""
        return cls(model.height, model.width, model.text_length)


class Trained(NamedTuple):
    """How a network is trained.

    Attributes:
        train, lora_rank, lora_targets: as the knobs of these names say.
        weights: dtype of trained weights as matrix products find them.
        compute: dtype of matrix products, and of frozen weights.
    """

    train: str
    lora_rank: int
    lora_targets: str
    weights: str
    compute: str


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass of one image keeps for the backward pass.

    Attributes:
        outside: outside of the blocks.
        blocks: in each block, in the order of evaluation.
        inputs: those of each block, which are all that is kept if it is recomputed.
    """

    outside: int
    blocks: tuple[int, ...]
    inputs: tuple[int, ...]

    def peak(self, recompute_every: int) -> int:
        """The most bytes at a time; every n-th block is recomputed in the backward pass, 0: none.

        A recomputed block keeps its inputs, and the rest while the backward pass is in it.
        """
        if not recompute_every:
            return self.outside + sum(self.blocks)
        pairs = enumerate(zip(self.blocks, self.inputs, strict=True))
        held = sum(inputs if i % recompute_every == 0 else kept for i, (kept, inputs) in pairs)
        return self.outside + held + max(self.blocks)


class Network:
    """A family's transformer.

    Attributes:
        family, config: the family, and the whole configuration of the transformer.
        parameters, outside: numbers of parameters: all, and those outside of the blocks.
        unused: parameters that no prediction depends on.
        largest_block, largest_weight: numbers of parameters.
        order: for each block in the order of evaluation, the name of the one that is evaluated.

    Raises:
        ValueError: the settings are not those of such a transformer.
    """

    def __init__(self, family: Family, settings: Mapping[str, Any]) -> None:
        module = make_part(family, "transformer", settings)
        self.family = family
        self.config: Mapping[str, Any] = dict(module.config)
        blocks = [sum(map(Tensor.numel, b.parameters())) for b in repeated_blocks(module)]
        if not blocks:
            raise cannot_be("transformer", ValueError("it has no blocks"))
        sizes = [parameter.numel() for parameter in module.parameters()]
        self.parameters = sum(sizes)
        self.largest_block, self.largest_weight = max(blocks), max(sizes)
        self.outside = self.parameters - sum(blocks)
        named = module.named_parameters()
        self.unused = sum(p.numel() for name, p in named if not family.uses(name, self.config))
        self._layers = {
            name: tuple(layer.weight.shape)
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and family.uses(f"{name}.weight", self.config)
        }
        self._thin, self.order = module, _leave_out_repetitions(module)

    def adapted(self, rank: int, targets: str) -> list[int]:
        """Numbers of weights of the trained adapters of this rank, two for each adapted layer.

        Args:
            targets: a value of ``model.lora_targets``.
        """
        wanted = re.compile(self.family.lora_targets[targets])
        layers = [shape for name, shape in self._layers.items() if wanted.fullmatch(name)]
        return [rank * side for shape in layers for side in shape]

    def counts(self, model: ModelConfig) -> tuple[int, int]:
        """Trained and frozen parameters."""
        if model.train == "full":
            return self.parameters - self.unused, self.unused
        return sum(self.adapted(model.lora_rank, model.lora_targets)), self.parameters

    def latent_shape(self, size: Size) -> tuple[int, int]:
        """(S, C) of an image's latent."""
        tokens = self.family.tokens(size.height, size.width)
        return tokens, self.family.latent_channels(self.config)

    @functools.cache  # noqa: B019 networks live as long as the process
    def products(self, size: Size) -> Products:
        """Floating-point operations of one evaluation for one image."""
        meter = self._evaluated(size, _frozen("float32"), like_gpu=False, keep=False)
        found = [meter.sections[name] for name in ("", *self.order)]
        weights, attention = (
            sum(getattr(section, kind) for section in found) // _IMAGES
            for kind in ("weights", "attention")
        )
        return Products(weights, attention)

    @functools.cache  # noqa: B019
    def evaluation(self, size: Size, compute: str) -> int:
        """Bytes of activations that are alive in an evaluation without gradients, for one image."""
        peak = self._evaluated(size, _frozen(compute), like_gpu=True, keep=False).peak
        return round(_UNUSABLE * peak) // _IMAGES

    @functools.cache  # noqa: B019
    def kept(self, size: Size, trained: Trained) -> Kept:
        """Bytes that a forward pass of one image keeps."""
        sections = self._evaluated(size, trained, like_gpu=True, keep=True).sections
        return Kept(
            outside=sections[""].kept // _IMAGES,
            blocks=tuple(sections[name].kept // _IMAGES for name in self.order),
            inputs=tuple(sections[name].inputs // _IMAGES for name in self.order),
        )

    def _evaluated(self, size: Size, trained: Trained, like_gpu: bool, keep: bool) -> Meter:
        knobs = _knobs(size, trained)
        resting = trained.weights if trained.train == "full" else trained.compute
        module = nn.Module.to(copy.deepcopy(self._thin), getattr(torch, resting))
        policy, compute = _policy(self.family, module, knobs), getattr(torch, trained.compute)
        meter = Meter(policy.module)
        for name in dict.fromkeys(self.order):
            meter.watch(name, policy.module.get_submodule(name))
        x, sigma, text = _inputs(policy, size, compute)
        with (
            torch.set_grad_enabled(keep),
            torch.autograd.graph.saved_tensors_hooks(meter.keep, lambda tensor: tensor),
            meter,
        ):
            try:
                with LikeGpu(compute) if like_gpu else contextlib.nullcontext():
                    self.family.predict(policy.module, x, sigma, text, policy.setup)
            except Exception as error:  # whatever a library raises for settings that do not fit
                raise cannot_be("transformer", error) from error
        return meter


def network_of(model: Model) -> Network:
    """The transformer of a model folder, or the published one of the family if there is none.

    Raises:
        OSError, ValueError: the family is not known, or the configuration cannot be used.
    """
    family = family_for(model)
    return _network(family, json.dumps(settings_of(model, "transformer"), sort_keys=True))


@functools.cache
def _network(family: Family, settings: str) -> Network:
    return Network(family, json.loads(settings))


class _Repetition(nn.Module):
    """Takes the place of a block that costs what the block before it costs."""

    def __init__(self, measured: Any, is_last: bool) -> None:
        super().__init__()
        self._measured = [measured]  # a list, which does not make it a part of this module
        self.is_last = is_last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (measured,) = self._measured
        outputs = measured.made
        if self.is_last:
            measured.made = None  # what is not needed any more counts as freed
        return outputs


def _note_outputs(block: Any, args: Any, outputs: Any) -> None:
    block.made = outputs


def _leave_out_repetitions(module: Any) -> tuple[str, ...]:
    """Replaces all blocks of a kind but the first two; returns who stands for each block."""
    wanted, order = set(repeated_blocks(module)), []
    kinds: defaultdict[Any, list[str]] = defaultdict(list)
    for name, block in list(module.named_modules()):
        if block in wanted:
            shapes = tuple((n, p.shape) for n, p in block.named_parameters())
            kind = kinds[name.rpartition(".")[0], type(block), shapes]
            kind.append(name)
            order.append(kind[:2][-1])
    for _, second, *others in (kind for kind in kinds.values() if len(kind) > 2):
        measured = module.get_submodule(second)
        measured.register_forward_hook(_note_outputs)
        for name in others:
            module.set_submodule(name, _Repetition(measured, name == others[-1]))
    return tuple(order)


def _frozen(compute: str) -> Trained:
    return Trained("full", 1, "all", compute, compute)


def _knobs(size: Size, trained: Trained) -> ModelConfig:
    return ModelConfig(
        path="",
        train=trained.train,  # type: ignore[arg-type]
        lora_rank=trained.lora_rank,
        lora_targets=trained.lora_targets,  # type: ignore[arg-type]
        compute_dtype=trained.compute,  # type: ignore[arg-type]
        gradient_checkpointing=False,
        **size._asdict(),
    )


def _policy(family: Family, module: nn.Module, knobs: ModelConfig) -> DiffusersPolicy:
    """The policy as it is trained, without its other parts."""
    from mixgrpo.models.policy import DiffusersPolicy  # imports diffusers, which takes seconds

    others: Any = SimpleNamespace(transformer=module, vae=nn.Identity())
    text: Any = SimpleNamespace()
    policy = DiffusersPolicy(family, others, knobs, torch.device("meta"), text)
    policy.make_trainable(seed=0)
    return policy


def _inputs(
    policy: DiffusersPolicy, size: Size, compute: torch.dtype
) -> tuple[Tensor, Tensor, TextEmbedding]:
    width, pooled = policy.family.text_widths(policy.setup.transformer)
    with torch.device("meta"):
        return (
            torch.empty(_IMAGES, *policy.latent_shape),
            torch.empty(_IMAGES),
            TextEmbedding(
                torch.empty(_IMAGES, size.text_length, width, dtype=compute),
                torch.empty(_IMAGES, pooled, dtype=compute) if pooled else None,
            ),
        )
