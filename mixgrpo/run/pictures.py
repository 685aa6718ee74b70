"""Images of a run: grids of samples, images before and after training, curves."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mixgrpo.files.disk import write_text_whole, write_whole


def to_bytes(images: Tensor) -> Tensor:
    """[N, 3, H, W] in [0, 1] -> uint8."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """Converts an image [3, H, W] uint8 to PIL."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def save_pictures(images: Tensor, folder: Path) -> None:
    """Writes images [N, 3, H, W] uint8 as ``000.png``, ``001.png``, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        to_pil(image).save(folder / f"{index:03d}.png")


def save_scores(prompts: Sequence[str], scores: Mapping[str, Tensor], folder: Path) -> None:
    """Writes ``scores.json`` beside the images: their n prompts, and n scores of each reward.

    A score that is no number is null.
    """
    known = {
        name: [value if math.isfinite(value) else None for value in values.tolist()]
        for name, values in scores.items()
    }
    text = json.dumps({"prompts": list(prompts), "scores": known}, ensure_ascii=False)
    write_text_whole(folder / "scores.json", text + "\n")


def before_after(
    before: Tensor, after: Tensor, prompts: Sequence[str], path: Path, columns: int = 4
) -> None:
    """A grid of pairs: left the base model's image, right the trained model's, above the prompt."""
    figure_class = _figure_class()
    rows = -(-len(prompts) // columns)
    figure = figure_class(figsize=(3.4 * columns, 2.25 * rows), layout="constrained")
    for index, prompt in enumerate(prompts):
        axes = figure.add_subplot(rows, columns, index + 1)
        height, width = before.shape[2:]
        gap = torch.full((3, height, max(2, width // 32)), 255, dtype=torch.uint8)
        pair = torch.cat([before[index].cpu(), gap, after[index].cpu()], dim=2)
        axes.imshow(pair.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(textwrap.fill(textwrap.shorten(prompt, 90), 34), fontsize=8)
        axes.axis("off")
    figure.suptitle("before | after training, same prompt and noise", fontsize=10)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110))


def reward_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots training rewards and validation scores by iteration, one panel per name.

    Args:
        history: the records of ``metrics.jsonl``; those without a quantity are skipped over.
    """
    names = sorted({key.split("/", 1)[1] for record in history for key in record
                    if key.startswith(("reward/", "validation/"))})  # fmt: skip
    if not names:
        return
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = _figure_class()(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, index + 1)
        _curve(axes, history, f"reward/{name}", "training prompts", smooth=True)
        _curve(axes, history, f"validation/{name}", "validation prompts")
        _curve(axes, history, f"validation_ema/{name}", "validation, EMA")
        axes.set_title(name)
        axes.set_xlabel("iteration")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110))


def _curve(
    axes: Any, history: Sequence[dict[str, Any]], key: str, label: str, smooth: bool = False
) -> None:
    points = [(r["iteration"], r[key]) for r in history if r.get(key) is not None]
    if not points:
        return
    x, y = (list(values) for values in zip(*points, strict=True))
    if not smooth:
        axes.plot(x, y, marker="o", markersize=3, label=label)
        return
    (line,) = axes.plot(x, y, alpha=0.25)
    width = max(1, len(y) // 20)
    mean = [sum(y[max(0, i - width) : i + 1]) / len(y[max(0, i - width) : i + 1])
            for i in range(len(y))]  # fmt: skip
    axes.plot(x, mean, color=line.get_color(), label=f"{label}, running mean")


def _figure_class() -> Any:
    # Figure without pyplot: no display is asked for and no figure outlives its function.
    from matplotlib.figure import Figure

    return Figure
