"""Classifier-free guidance: the branches, their gradients and counts, and negative prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from small import (
    Recording,
    SmallNet,
    gradient_of,
    relative_error,
    small_noise,
    small_plan,
    small_text,
)
from torch import Tensor

from mixgrpo.assembly import make_negative, make_windows
from mixgrpo.checks import check
from mixgrpo.config import Config, ModelConfig, RewardConfig, UpdateConfig
from mixgrpo.maths.transitions import make_log_ratio, make_transition
from mixgrpo.methods.grpo import Objective, update
from mixgrpo.models.flux import FLUX
from mixgrpo.models.guidance import Guidance, Guides, guided
from mixgrpo.planning.coverage_report import Coverage
from mixgrpo.rollout import rollout
from mixgrpo.run.start import announce
from mixgrpo.text.negative import GuidedText, negative_for, negative_prompts
from mixgrpo.text.prompt_files import parse
from mixgrpo.types import TextEmbedding

SCALE = 4.0
TEXT = replace(small_text(2), negative=small_text(1, seed=9))


def inputs(count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, 4, generator=generator), torch.rand(count, generator=generator)


def make(net: SmallNet, **knobs: bool):
    return guided(net, FLUX.guide, Guidance(SCALE, **knobs))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("each", [False, True], ids=["one-negative", "a-negative-each"])
def test_the_guided_velocity_is_its_formula(batched: bool, each: bool) -> None:
    """u + w (c - u), by hand for every row alone."""
    net, (x, sigma) = SmallNet(), inputs()
    text = replace(TEXT, negative=small_text(2, seed=9)) if each else TEXT
    found = make(net, batched=batched)(x, sigma, text)
    for row in range(2):
        at = slice(row, row + 1)
        c = net(x[at], sigma[at], text.positive[at])
        u = net(x[at], sigma[at], text.negative[at] if each else text.negative)
        torch.testing.assert_close(found[at], u + SCALE * (c - u), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batched", [False, True])
def test_gradients_flow_through_both_branches(batched: bool) -> None:
    net, (x, sigma) = SmallNet(), inputs()
    parameters = list(net.parameters())
    make(net, batched=batched)(x, sigma, TEXT).square().mean().backward()
    found = gradient_of(parameters)
    net.zero_grad()
    c = net(x, sigma, TEXT.positive)
    u = net(x, sigma, TEXT.negative.repeat_each(2))
    (u + SCALE * (c - u)).square().mean().backward()
    assert relative_error(found, gradient_of(parameters)) < 1e-6


def test_the_unconditional_branch_may_have_no_gradient() -> None:
    net, (x, sigma) = SmallNet(), inputs()
    parameters = list(net.parameters())
    v = make(net, unconditional_gradient=False)(x, sigma, TEXT)
    torch.testing.assert_close(v, make(net)(x, sigma, TEXT))  # the same velocity
    v.square().mean().backward()
    found = gradient_of(parameters)
    net.zero_grad()
    u = net(x, sigma, TEXT.negative.repeat_each(2)).detach()
    (u + SCALE * (net(x, sigma, TEXT.positive) - u)).square().mean().backward()
    assert relative_error(found, gradient_of(parameters)) < 1e-6


@pytest.mark.parametrize("batched", [False, True])
def test_sharing_stays_exact_and_the_ratio_is_one(batched: bool) -> None:
    """Samples that share their noise are sampled as if each were alone, and before the first step
    the update predicts what the rollout predicted."""
    net = SmallNet()
    velocity, plan = make(net, batched=batched), replace(small_plan(), passes=2)
    noise = small_noise()
    shared = rollout(velocity, TEXT, plan, noise, micro_batch=4)
    alone = rollout(velocity, TEXT, replace(plan), replace(noise, shared=False), micro_batch=1)
    assert shared.evaluations == 2 * (
        2 * 4 + 6 * 4
    )  # (l+1) for each group, and T-l-1 for each image
    assert alone.evaluations == 2 * 6 * 8
    engine = Recording(net)
    objective = Objective(
        make_transition("flow_sde", 0.7), make_log_ratio("normal"), clip=1e-4, passes=2
    )
    knobs = UpdateConfig(optimizer_steps=1, micro_batch=3)
    advantages = torch.linspace(-1, 1, 6)
    metrics = update(engine, velocity, shared, advantages, objective, knobs)
    assert metrics["ratio_error_on_policy"] < 1e-6
    assert metrics["evaluations_per_image"] == pytest.approx(2 * (2 * 1 + 6) / 6)


def test_other_scales_in_the_update_change_the_ratio() -> None:
    net = SmallNet()
    trajectory = rollout(make(net), TEXT, small_plan(), small_noise(), micro_batch=4)
    objective = Objective(make_transition("flow_sde", 0.7), make_log_ratio("normal"), clip=1e-4)
    plain = guided(net, FLUX.guide, Guidance(2.0))
    knobs = UpdateConfig(optimizer_steps=1)
    metrics = update(Recording(net), plain, trajectory, torch.ones(6), objective, knobs)
    assert metrics["ratio_error_on_policy"] > 1e-3


# ---- texts


class Letters:
    """Embeddings of the letters of a prompt, and what was encoded."""

    def __init__(self) -> None:
        self.encoded: list[list[str]] = []

    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        self.encoded.append(list(prompts))
        rows = [torch.tensor([[[float(ord(c))] for c in prompt]]) for prompt in prompts]
        return TextEmbedding.join([TextEmbedding(row) for row in rows])

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return 0


def test_a_shared_negative_prompt_is_encoded_once() -> None:
    letters = Letters()
    text = GuidedText(letters, "no")
    for prompts in (["a", "bc"], ["d", "efg"]):
        found = text.encode(prompts, [{}, {}])
        assert found.negative.tokens.flatten().tolist() == [ord("n"), ord("o")]
        assert found.lengths.tolist() == [1, len(prompts[1])]
    assert letters.encoded == [["a", "bc"], ["no"], ["d", "efg"]]


def test_a_prompts_own_negative_prompt_goes_with_it() -> None:
    text = GuidedText(Letters(), "no").encode(["a", "b"], [{"negative_prompt": "xyz"}, {}])
    chosen = text[torch.tensor([1, 0, 1])]
    assert chosen.negative.lengths.tolist() == [2, 3, 2]
    assert chosen.negative.tokens[1].flatten().tolist() == [ord(c) for c in "xyz"]
    assert text.repeat_each(2).negative.lengths.tolist() == [3, 3, 2, 2]


def test_without_guidance_nothing_more_is_encoded() -> None:
    letters = Letters()
    assert GuidedText(letters, None).encode(["a"], [{"negative_prompt": "b"}]).negative is None
    assert letters.encoded == [["a"]]


@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 2])])
def test_whether_a_batch_is_masked_depends_on_shapes_alone(lengths: Tensor | None) -> None:
    """A part of a padded batch in which nothing happens to be padding keeps its mask."""
    text = TextEmbedding(torch.ones(2, 2, 1), lengths=lengths)
    assert (TextEmbedding.join([text, text]).lengths is None) == (lengths is None)
    padded = TextEmbedding.join([TextEmbedding(torch.ones(1, n, 1)) for n in (1, 3, 3)])
    assert padded[1:].lengths.tolist() == [3, 3]


def test_joining_pads_with_zeros() -> None:
    joined = TextEmbedding.join([TextEmbedding(torch.full((1, n, 2), float(n))) for n in (2, 3)])
    assert joined.tokens[:, :, 0].tolist() == [[2, 2, 0], [3, 3, 3]]
    assert joined.lengths.tolist() == [2, 3]


# ---- knobs


def with_guidance(**knobs: object) -> Config:
    config = Config(rewards={"size": RewardConfig(kind="jpeg_size")})
    config.guidance = replace(config.guidance, **knobs)
    return config


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"negative_prompt": "blurry"}, "'blurry', but guidance.scale is 1.*above 1"),
        ({"scale": 0.5}, r"guidance.scale.*0.5"),
        ({"update_scale": float("nan")}, "guidance.update_scale"),
        ({"scale": 2.0, "batched": True, "unconditional_gradient": False}, "branches apart"),
        ({"scale": 2.0, "negative_prompt": "a\0b"}, "NUL"),
    ],
)
def test_knobs_that_cannot_be(knobs: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(with_guidance(**knobs), None)


def test_a_distilled_model_says_which_knob_is_meant() -> None:
    config = with_guidance(validation_scale=4.0)
    config.model.family = "flux"
    with pytest.raises(
        ValueError,
        match=r"^guidance.validation_scale is 4, but FLUX.*--guidance"
        r".validation_scale 1 .*--model\.guidance",
    ):
        make_negative(config)
    without = {"guidance.scale": 1.0, "guidance.update_scale": None}
    assert negative_for(ModelConfig(family="flux"), without, None) is None


def test_each_phase_has_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(FLUX), "negative", " ")
    config = with_guidance(scale=4.0, validation_scale=1.0, batched=True)
    config.model.family = "flux"
    guides = Guides.of(config.guidance)
    assert [guides.rollout.scale, guides.update.scale, guides.validation.scale] == [4, 4, 1]
    assert [guides.rollout.passes, guides.validation.passes] == [2, 1]
    assert make_negative(config) == " " and guides.update.batched
    assert Guides.of(replace(config.guidance, update_scale=7.0)).update.scale == 7


def test_the_schedule_counts_both_branches() -> None:
    plain, both = (Coverage(with_guidance(scale=scale)) for scale in (1.0, 4.0))
    assert both.mean.rollout == 2 * plain.mean.rollout
    assert both.mean.update == 2 * plain.mean.update
    config = with_guidance(scale=4.0, update_scale=1.0)
    assert Coverage(config).mean.update == plain.mean.update


def test_negative_prompts_of_a_file() -> None:
    lines = b'{"prompt": "a", "negative_prompt": "b"}\n{"prompt": "c"}\n'
    assert negative_prompts(parse(lines, "p.jsonl").metadata, "d") == ["b", "d"]
    with pytest.raises(ValueError, match="line 2 has a number as its negative_prompt"):
        parse(b'{"prompt": "a"}\n{"prompt": "c", "negative_prompt": 3}', "p.jsonl")


@pytest.mark.parametrize(("scale", "warned"), [(None, False), (4.0, False), (2.0, True)])
def test_another_scale_in_the_update_is_announced(scale: float | None, warned: bool) -> None:
    config, said = with_guidance(scale=4.0, update_scale=scale), []
    announce(said.append, config, Recording(SmallNet()), make_windows(config), 1, 0)
    assert any("ratio of an unchanged policy is not 1" in line for line in said) == warned
