"""Prompts that a reward cannot score: found before a run starts, by the run and by the doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixgrpo.config import Config, RewardConfig
from mixgrpo.doctor.prompts import check_prompts
from mixgrpo.run.scorable import (
    TRAINING,
    VALIDATION,
    Unscorable,
    check_scorable,
    find_unscorable,
)
from mixgrpo.text.prompt_files import PromptList

QUOTED, PLAIN = 'a sign "Open"', "a dog"
OCR = RewardConfig("ocr")
TRANSCRIBER = RewardConfig(
    "vlm", model="m", options={"urls": "http://localhost:1", "task": "transcribe", "key": "text"}
)


class Counted:
    """A reward of somebody's own, which needs a number from the prompt's metadata."""

    def __init__(self, least: int = 0) -> None:
        raise AssertionError("asked without being made")

    @staticmethod
    def unscorable(text: str, metadata: dict[str, Any], *, least: int = 0) -> str:
        return "" if metadata.get("n", -1) >= least else f"needs n of at least {least}"


def found(
    training: PromptList, validation: PromptList, **rewards: RewardConfig
) -> list[tuple[str, str, int, int]]:
    files = {TRAINING: training, VALIDATION: validation}
    each = find_unscorable(Config(rewards=rewards), files)
    return [(one.reward, one.knob, one.count, one.total) for one in each]


def plain(*texts: str) -> PromptList:
    return PromptList.plain(texts)


def test_rewards_are_asked_about_the_prompts_that_they_will_score() -> None:
    """Those that are held out only about validation; those that need nothing, not at all."""
    rewards = {
        "text": OCR,
        "held_out": RewardConfig("ocr", weight=0),
        "read": TRANSCRIBER,
        "size": RewardConfig("jpeg_size"),
        "colour": RewardConfig("tiny_world:redness"),
        "own": RewardConfig("test_scorable:Counted", options={"least": 3}),
    }
    training = PromptList([QUOTED, PLAIN, PLAIN], [{"n": 3}, {"text": "x"}, {"n": 2}])
    assert found(training, plain(PLAIN, QUOTED), **rewards) == [
        ("text", TRAINING, 2, 3),
        ("text", VALIDATION, 1, 2),
        ("held_out", VALIDATION, 1, 2),
        ("read", TRAINING, 2, 3),
        ("read", VALIDATION, 2, 2),
        ("own", TRAINING, 2, 3),
        ("own", VALIDATION, 2, 2),
    ]
    assert found(plain(QUOTED), plain(QUOTED), text=OCR) == []


def test_a_share_is_allowed_as_it_is_of_an_iterations_images() -> None:
    config = Config(rewards={"text": OCR})
    check_scorable(config, plain(QUOTED, PLAIN), plain(QUOTED))
    with pytest.raises(ValueError) as info:
        check_scorable(config, plain(PLAIN, QUOTED, "b" * 90), plain(QUOTED))
    assert str(info.value) == (
        "rewards.text cannot score 2 of the 3 prompts of batch.prompts_file, more than "
        "scoring.max_failed allows (0.5): 'a dog' quotes no text; put the text that the image "
        "should show in quotation marks, or set the option key to the key of the metadata that "
        "holds it"
    )
    with pytest.raises(ValueError, match=r"1 of the 1 prompts of validation\.prompts_file"):
        check_scorable(config, plain(QUOTED), plain(PLAIN))
    config.scoring.max_failed = 1.0
    check_scorable(config, plain(PLAIN), plain(PLAIN))


def test_what_is_said_is_short_and_has_a_remedy() -> None:
    rewards = {"own": RewardConfig("test_scorable:Counted")}
    with pytest.raises(ValueError, match=r"'b{80}\.\.\.' needs n of at least 0; correct these"):
        check_scorable(Config(rewards=rewards), plain("b" * 999), plain(QUOTED))
    few = Unscorable("text", TRAINING, 1, 4, PLAIN, "quotes no text", "quote one")
    assert few.told(0.5) == (
        "rewards.text cannot score 1 of the 4 prompts of batch.prompts_file: 'a dog' quotes no text"
    )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (RewardConfig("ocr", options={"key": 3}), "rewards.r: ocr: key must be a non-empty string"),
        (RewardConfig("ocr", options={"kez": "a"}), "rewards.r: reward 'ocr' has no option kez"),
        (RewardConfig("ocrr"), "rewards.r: unknown reward 'ocrr'"),
    ],
)
def test_options_that_are_wrong(knobs: RewardConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(plain(QUOTED), plain(QUOTED), r=knobs)


def config_on(folder: Path, training: list[dict[str, Any]], **rewards: RewardConfig) -> Config:
    """A configuration whose validation takes the first of two prompts, a quoted one."""
    config = Config(rewards=rewards)
    config.run.folder, config.model.path = str(folder / "run"), str(folder / "nothing")
    for name, entries in (
        ("batch", training),
        ("validation", [{"prompt": QUOTED, "text": "Open"}, {"prompt": PLAIN}]),
    ):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        getattr(config, name).prompts_file = str(path)
    config.validation.prompts = 1
    return config


def test_the_doctor_reports_also_what_a_run_allows(tmp_path: Path) -> None:
    prompts = [{"prompt": QUOTED, "text": "Open"}, {"prompt": PLAIN}, {"prompt": PLAIN, "n": 4}]
    wrong = RewardConfig("ocr", options={"key": ""})  # for the check of the rewards to report
    rewards = {"wrong": wrong, "text": OCR, "read": TRANSCRIBER}
    config = config_on(tmp_path, prompts, **rewards)
    config.scoring.max_failed = 0.6
    lines = [line for line in check_prompts(config, 1) if "cannot score" in line.text]
    assert [line.level for line in lines] == ["error", "error"]
    assert "rewards.text cannot score 2 of the 3 prompts of batch.prompts_file" in lines[0].text
    assert lines[0].remedy.startswith("put the text that the image should show in quotation marks")
    assert "rewards.read cannot score 2 of the 3" in lines[1].text
    config.scoring.max_failed = 0.7
    lines = [line for line in check_prompts(config, 1) if "cannot score" in line.text]
    assert [line.level for line in lines] == ["warning", "warning"]


def test_a_run_does_not_start(world: Any, folder: Path, tmp_path: Path) -> None:
    """Neither the rewards nor the model are loaded, and nothing is written."""
    from tiny_world import train_here

    path = tmp_path / "prompts.txt"
    path.write_text(f"{PLAIN}\n{PLAIN}\n{QUOTED}\n")
    knobs = {"rewards": {"text": OCR}, "batch__prompts_file": str(path), "model__path": "nowhere"}
    with pytest.raises(ValueError, match=r"rewards\.text cannot score 2 of the 3 prompts"):
        train_here(world.config(folder, **knobs))
    assert not folder.exists()
