"""What a run reports: the progress bar, ``metrics.jsonl``, wandb, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mixgrpo.config import Config, flatten
from mixgrpo.devices import Clock
from mixgrpo.files.disk import first_free, write_text_whole
from mixgrpo.files.json_lines import read_records
from mixgrpo.files.regular import MIB, read_regular

WANDB_PATIENCE = 60  # seconds to wait for the server of wandb
_BETWEEN = "between phases"


class _Span(NamedTuple):
    """A phase that has ended, from one moment to another, and the phases nested in it."""

    name: str
    start: Any
    end: Any
    parts: list[_Span]


class Phases:
    """Seconds spent in each named phase since the last ``take``, excluding phases nested in it.

    Of nested phases the host does not wait for the end, so that a GPU never runs dry because of
    them; at the end of an outermost one it does.
    """

    def __init__(
        self, device: torch.device, progress: Callable[[str], None] = lambda name: None
    ) -> None:
        """
        Args:
            progress: called with the name of a phase when it begins and when a nested one ends.
        """
        self.clock = Clock(device)
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._name = _BETWEEN
        self._parts: list[_Span] = []  # those of the present phase that have ended

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer_name, self._name = self._name, name
        outer, self._parts = self._parts, []
        self.progress(name)
        start = self.clock.now()
        try:
            yield
            span = _Span(name, start, self.clock.now(), self._parts)
        finally:
            self._parts, self._name = outer, outer_name
        if outer_name == _BETWEEN:
            self._count(span)
        else:
            self._parts.append(span)
        self.progress(outer_name)

    def _count(self, span: _Span) -> float:
        """Waits for a phase's end and adds its seconds; returns them with those of its parts."""
        whole = self.clock.seconds(span.start, span.end)
        self.add(span.name, whole - sum(map(self._count, span.parts)))
        return whole

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds that were measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's ``metrics.jsonl``, without lines that are not records."""
    return read_records(folder / "metrics.jsonl").records


def write_file(path: Path, text: str) -> None:
    """Writes a file of the run's folder atomically.

    Raises:
        OSError: with the remedy.
    """
    try:
        write_text_whole(path, text)
    except OSError as error:
        raise _cannot_write(str(path), error) from error


def _cannot_write(name: str, error: OSError) -> OSError:
    return OSError(
        f"cannot write {name} ({error.strerror}); free some disk space, then continue from the "
        "newest checkpoint with --run.resume true"
    )


def is_validation(record: dict[str, Any]) -> bool:
    """Whether a record is that of a validation."""
    return any(key.startswith("validation/") for key in record)


class Tracker:
    """Reports from rank 0; on other ranks every method does nothing."""

    def __init__(self, config: Config, folder: Path, first_iteration: int, active: bool) -> None:
        self.active = active
        self.folder = folder
        self.wandb: Any = None
        self.tensorboard: Any = None
        if not active:
            return
        path = folder / "metrics.jsonl"
        _keep_records(path, first_iteration, config.run.iterations)
        _keep_pictures(folder / "pictures", first_iteration)
        self.file = path.open("a", buffering=1, encoding="utf-8")
        self.bar = tqdm(
            total=config.run.iterations,
            initial=first_iteration,
            disable=not config.log.progress,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        )
        self.wandb = _start_wandb(config, folder)
        if config.log.tensorboard:
            self.tensorboard = _start_tensorboard(config, folder, first_iteration)

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """Logs metrics under the number of iterations done; NaN is written as null."""
        if not self.active:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        try:
            self.file.write(json.dumps({"iteration": iteration, **finite}) + "\n")
        except OSError as error:
            raise _cannot_write(self.file.name, error) from error
        known = {k: v for k, v in finite.items() if v is not None}
        if self.wandb:
            self.wandb.log(known, step=iteration)
        if self.tensorboard:
            _add_scalars(self.tensorboard, iteration, known)
            self.tensorboard.flush()

    def advance(self, summary: str) -> None:
        """Advances the progress bar by one iteration."""
        if self.active:
            self.bar.set_postfix_str(summary, refresh=False)
            self.bar.update()

    def pictures(self, iteration: int, images: Tensor, captions: Sequence[str]) -> None:
        """Logs images [N, 3, H, W] uint8 to wandb and TensorBoard."""
        if self.tensorboard:
            for place, image in enumerate(images.cpu()):
                self.tensorboard.add_image(f"pictures/{place:03d}", image, iteration)
            self.tensorboard.flush()
        if self.wandb:
            import wandb

            shown = [
                wandb.Image(image.permute(1, 2, 0).cpu().numpy(), caption=caption)
                for image, caption in zip(images, captions, strict=True)
            ]
            self.wandb.log({"pictures": shown}, step=iteration)

    def say(self, text: str) -> None:
        """Prints without breaking the progress bar."""
        if self.active:
            tqdm.write(text)

    def warn(self, title: str, text: str) -> None:
        """Prints a warning, and sends it to wandb as an alert."""
        self.say(f"warning: {text}")
        if self.wandb:
            self.wandb.alert(title=title, text=text)

    def close(self) -> None:
        if self.active:
            self.bar.close()
            with contextlib.suppress(OSError):  # ``log`` has reported what was not written
                self.file.close()
            if self.wandb:
                self.wandb.finish()
            if self.tensorboard:
                self.tensorboard.close()


def _keep_records(path: Path, done: int, total: int) -> None:
    """Drops the records that a run which continues after ``done`` iterations will write again.

    These are those of later iterations, and of the validation at the start or end of the run. The
    file is copied first if it holds anything but records.

    Raises:
        OSError, ValueError: the file cannot be read or written; it is untouched.
    """

    def is_kept(record: dict[str, Any]) -> bool:
        if record["iteration"] != done:
            return bool(record["iteration"] < done)
        return not (is_validation(record) and done in (0, total))

    found = read_records(path)
    if found.damaged:
        copy = first_free(path.parent, "metrics_damaged_{}.jsonl")
        shutil.copyfile(path, copy)
        print(
            f"warning: {len(found.damaged)} of {found.lines} lines of {path} are not whole "
            f"records, the first of them line {found.damaged[0]}; what can be read of them is "
            f"kept, and the file as it was is now {copy.name}",
            file=sys.stderr,
        )
    kept = (record for record in found.records if is_kept(record))
    write_file(path, "".join(json.dumps(record) + "\n" for record in kept))


def _keep_pictures(folder: Path, done: int) -> None:
    """Removes the images of validations that a run continuing after ``done`` iterations repeats."""
    for place in folder.glob("iteration_*"):
        number = place.name.removeprefix("iteration_")
        if number.isdecimal() and (int(number) > done or done == 0):
            place.unlink() if place.is_symlink() else shutil.rmtree(place)


def _start_tensorboard(config: Config, folder: Path, done: int) -> Any:
    """A writer to ``folder/tensorboard`` that purges events of iterations that will be repeated.

    Records that were kept but whose events are purged or missing are written again: those of the
    iteration ``done`` if its validation is repeated, and all if nothing was written before.
    """
    from torch.utils.tensorboard import SummaryWriter

    target = folder / "tensorboard"
    is_at_an_end = done in (0, config.run.iterations)
    first = 0 if not target.exists() else done if is_at_an_end else done + 1
    writer = SummaryWriter(str(target), purge_step=first)
    rows = "".join(f"| {name} | `{value}` |\n" for name, value in flatten(config).items())
    writer.add_text("config", f"| knob | value |\n|---|---|\n{rows}", first)
    for record in read_metrics(folder):
        if record["iteration"] >= first:
            values = {k: v for k, v in record.items() if k != "iteration" and v is not None}
            _add_scalars(writer, record["iteration"], values)
    return writer


def _add_scalars(writer: Any, iteration: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, iteration)


def _start_wandb(config: Config, folder: Path) -> Any:
    mode = config.log.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "disabled"
    if mode == "disabled":
        return None
    import wandb

    # The id is stored in the run's folder, so that a resumed run continues the same curves.
    marker = folder / "wandb_id"
    if not marker.exists() or not marker.stat().st_size:
        write_file(marker, uuid.uuid4().hex[:12])
    own = read_regular(marker, MIB).decode(errors="replace").strip()
    try:
        return wandb.init(
            project=config.log.project,
            name=folder.name,
            id=own,
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=flatten(config),
            settings=wandb.Settings(init_timeout=WANDB_PATIENCE),
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"wandb cannot be started ({reason}); set WANDB_API_KEY to a valid key, or "
            "--log.wandb offline or disabled"
        ) from error
