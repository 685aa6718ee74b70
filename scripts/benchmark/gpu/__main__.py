"""Proves and measures on one GPU: every part in a process of its own, within a time limit.

    bash scripts/benchmark/gpu.sh                      # nine minutes on one GPU
    bash scripts/benchmark/gpu.sh --small              # every part on a CPU, with small models
    bash scripts/benchmark/gpu.sh --parts lora plan    # only these
    bash scripts/benchmark/gpu.sh --report             # only write the tables from the kept results
    bash scripts/benchmark/gpu.sh --carry wheels       # packages for a machine without a network

Each result is appended to a file as soon as it is there, so that nothing is lost if the program is
stopped. A part that fails, hangs or is out of time does not stop the next one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import TextIO

from gpu.job import append, latest
from gpu.parts import PARTS, Part
from gpu.tables import failures, tables, write_readme
from mixgrpo.commands.before_torch import ALLOCATOR, prepare
from mixgrpo.files.json_lines import read_objects

ROOT = Path(__file__).resolve().parents[3]
KEPT = ROOT / "scripts" / "benchmark" / "results" / "gpu"
README = ROOT / "scripts" / "benchmark" / "README.md"
CPU_SECONDS = 150.0  # limit of every part with --small
ENDING = 10.0  # seconds that a part gets to end when its time is over
LAST_LINES = 6  # of a failed part's output, in the results
PLANNING = 20.0  # seconds at the end for the parts that need no GPU
# The name of the GPU, if there is one on which a tensor can be made.
ASK = """
import torch
if torch.cuda.is_available():
    torch.zeros(1, device="cuda")
    print(torch.cuda.get_device_name())
"""


@dataclass(frozen=True)
class Run:
    """One run of the program.

    Attributes:
        device: "cuda" or "cpu".
        small: small models.
        results: the file of the results.
        log: what the parts print.
        deadline: time by ``monotonic`` at which the program should be done.
    """

    device: str
    small: bool
    results: Path
    log: Path
    deadline: float

    def perform(self, part: Part) -> None:
        """Runs a part; reports when it began, how it ended, and how long it took."""
        left = self.deadline - monotonic()
        if part.least and left < part.least:
            said = f"{max(0, left):.0f} s were left, it needs {part.least:.0f}"
            append(self.results, {"part": part.name, "name": "not started", "skipped": said})
            print(f"{part.name}: not started: {said}", flush=True)
            return
        limit = CPU_SECONDS if self.small else part.seconds
        if part.least:
            limit = min(limit, left)
        append(self.results, {"part": part.name, "name": "began", "limit": limit})
        print(f"== {part.name}: {part.about} (at most {limit:.0f} s)", flush=True)
        start = perf_counter()
        with self.log.open("a") as log:
            print(f"== {part.name}", file=log, flush=True)
            begin = log.tell()
            code = self._wait(part, limit, log)
        seconds = perf_counter() - start
        ended: dict[str, object] = {"seconds": seconds, "exit_code": code}
        if code is None:
            ended["error"] = f"stopped after {limit:.0f} s, its limit"
        elif code:
            ended["error"] = last_lines(self.log, begin)
        append(self.results, {"part": part.name, "name": "ended", **ended})
        said = f": {ended['error']}" if "error" in ended else ""
        print(f"== {part.name} ended after {seconds:.0f} s{said}", flush=True)

    def _wait(self, part: Part, limit: float, log: TextIO) -> int | None:
        """The part's exit code; None if its time was over."""
        words = [sys.executable, "-m", part.module, "--device", self.device]
        words += ["--results", str(self.results), "--seconds", f"{limit:.0f}"]
        words += ["--small"] if self.small else []
        # A session of its own: what the part starts ends with it.
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started."""
    for number, patience in ((signal.SIGTERM, ENDING), (signal.SIGKILL, ENDING)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def last_lines(log: Path, begin: int) -> str:
    """The last lines that a part printed, from this place of the log on."""
    with log.open(errors="replace") as file:
        file.seek(begin)
        lines = [line.rstrip() for line in file if line.strip()]
    return "\n".join(lines[-LAST_LINES:])[-1000:]


# ---- the command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash scripts/benchmark/gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, names = parser.add_argument, [part.name for part in PARTS]
    add("--minutes", type=float, default=9.0, help="time limit of the whole program")
    add("--out", type=Path, help="folder of results, log and tables; default: "
        "scripts/benchmark/results/gpu, with --small runs/gpu")  # fmt: skip
    add("--parts", nargs="+", choices=names, default=names, metavar="PART",
        help=f"only these: {', '.join(names)}")  # fmt: skip
    add("--small", action="store_true", help="small models on the CPU, to test the program itself")
    add("--report", action="store_true", help="only write the tables of the README")
    add("--carry", type=Path, metavar="FOLDER", help="only download, into this folder, the wheels "
        "that a GPU machine without a network lacks")  # fmt: skip
    chosen = parser.parse_args(arguments)
    if chosen.minutes <= 0:
        parser.error("--minutes must be positive")
    return chosen


def card_name() -> str:
    """The GPU's name; empty if there is none.

    Asked of another process: this one should not hold memory on the GPU. The allocator is set as in
    a training, unless it cannot be used here.
    """
    prepare()
    ask = [sys.executable, "-c", ASK]
    said = subprocess.run(ask, capture_output=True, text=True, check=False)
    if said.returncode and os.environ.pop(ALLOCATOR[0], None):
        said = subprocess.run(ask, capture_output=True, text=True, check=False)
    if said.returncode:
        lines = said.stderr.strip().splitlines() or ["no output"]
        raise SystemExit(f"error: torch does not work in {sys.executable}: {lines[-1]}")
    return said.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts and prints the tables; returns 1 if a part failed, 130 if it was stopped."""
    chosen = parse(arguments)
    if chosen.carry is not None:
        import carry

        return carry.main([str(chosen.carry)])
    if chosen.report:
        write_readme(README, KEPT)
        return 0
    deadline = monotonic() + 60 * chosen.minutes - PLANNING
    card = "" if chosen.small else card_name()
    if not card and not chosen.small:
        print("error: torch sees no GPU; --small runs every part on the CPU", file=sys.stderr)
        return 1
    folder = chosen.out or (ROOT / "runs" / "gpu" if chosen.small else KEPT)
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", card) or "cpu"
    results = folder / f"{name}.jsonl"
    before = len(read_objects(results))
    run = Run(
        device="cuda" if card else "cpu",
        small=chosen.small,
        results=results,
        log=folder / f"{name}.log",
        deadline=deadline,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the parts must not outlive it
    is_stopped = False
    try:
        for part in PARTS:
            if part.name in chosen.parts:
                run.perform(part)
    except KeyboardInterrupt:
        is_stopped = True
    print(f"\n{tables(latest(read_objects(results)))}\nresults: {results}", flush=True)
    if is_stopped:
        print("stopped; the parts that had not ended can be run with --parts", flush=True)
        return 130
    return 1 if failures(latest(read_objects(results)[before:])) else 0


if __name__ == "__main__":
    sys.exit(main())
