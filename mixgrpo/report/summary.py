"""The summary of a finished run: scores before and after, an image grid, reward curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from mixgrpo.config import Config
from mixgrpo.evaluation.pictures import Unreadable, read_image
from mixgrpo.report.page import write_report
from mixgrpo.report.runs import read_run
from mixgrpo.run.hacking import hacking_warning
from mixgrpo.run.pictures import before_after, reward_curves
from mixgrpo.run.tracking import read_metrics
from mixgrpo.text.prompts import read_prompts


def summarize(folder: Path, config: Config) -> str:
    """Writes ``before_after.png``, ``rewards.png`` and ``report.html``.

    Returns:
        the closing table and the paths, as text to print.
    """
    history = read_metrics(folder)
    reward_curves(history, folder / "rewards.png")
    lines = [_table(history, config), f"reward curves: {folder / 'rewards.png'}"]
    lines += _before_after(folder, config)
    lines.append(f"report: {write_report([read_run(folder)], folder / 'report.html')}")
    lines.append(f"trained model: {folder / 'model'}")
    weights = {name: knobs.weight for name, knobs in config.rewards.items()}
    warning = hacking_warning(history, weights, config.validation.patience)
    if warning is not None:
        lines.append(f"warning: {warning}")
    return "\n".join(lines)


def _table(history: list[dict[str, Any]], config: Config) -> str:
    """Validation scores before and after training, one line per reward."""
    validations = [r for r in history if any(key.startswith("validation/") for key in r)]
    last = validations[-1]
    first = validations[0] if validations[0]["iteration"] == 0 else {}
    width = max(map(len, ("validation", *config.rewards)))
    rows = [
        f"{'validation':<{width}}  {'before':>8}  {'after':>8}  {'change':>8}  {'EMA':>8}",
    ]
    for name, knobs in config.rewards.items():
        before, after = first.get(f"validation/{name}"), last.get(f"validation/{name}")
        average = last.get(f"validation_ema/{name}")
        change = None if before is None or after is None else after - before
        cells = "  ".join(_cell(v, plus=v is change) for v in (before, after, change, average))
        rows.append(f"{name:<{width}}  {cells}  {'' if knobs.weight else 'held out'}".rstrip())
    return "\n".join(rows)


def _cell(value: float | None, plus: bool) -> str:
    if value is None:
        return f"{'-':>8}"
    return f"{value:>+8.4f}" if plus else f"{value:>8.4f}"


def _before_after(folder: Path, config: Config) -> list[str]:
    """Draws the grid; returns a line about it, or none if there are not two validations."""
    iterations = sorted((folder / "pictures").glob("iteration_*"))
    if len(iterations) < 2:
        return []
    ends = (sorted(place.glob("*.png")) for place in (iterations[0], iterations[-1]))
    pairs = list(zip(*ends, strict=False))
    if not pairs:
        return []
    prompts = read_prompts(config.validation.prompts_file, "validation.prompts_file").texts
    path = folder / "before_after.png"
    try:
        before, after = (_read_pictures(files) for files in zip(*pairs, strict=True))
    except ValueError as error:  # the training is complete whatever has become of its images
        return [f"before and after: not drawn, because {error}"]
    count = min(len(pairs), len(prompts))
    before_after(before[:count], after[:count], prompts[:count], path)
    return [f"before and after: {path}"]


def _read_pictures(files: Sequence[Path]) -> Tensor:
    """[N, 3, H, W] uint8; raises ValueError if one cannot be read, or their sizes differ."""
    read = []
    for file in files:
        try:
            read.append(pil_to_tensor(read_image(file)))
        except Unreadable as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if read[-1].shape != read[0].shape:
            raise ValueError(f"{file} and {files[0]} differ in size")
    return torch.stack(read)
