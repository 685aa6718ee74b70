"""What a part is asked to do, and where its results go."""

from __future__ import annotations

import argparse
import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from mixgrpo.files.json_lines import read_objects


@dataclass(frozen=True)
class Job:
    """One part's run.

    Attributes:
        part: its name.
        device: "cuda" or "cpu".
        small: small models and few repetitions, so that any machine is done in seconds.
        results: file to which every result is appended as soon as it is there, a line of JSON each.
        deadline: time by ``monotonic`` at which the part is stopped.
    """

    part: str
    device: str
    small: bool
    results: Path
    deadline: float

    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.deadline - monotonic()

    def report(self, name: str, **values: Any) -> None:
        """Appends a result; a later one of the same name replaces it in the tables."""
        append(self.results, {"part": self.part, "name": name, **values})
        print(f"{self.part}: {name}: {json.dumps(plain(values))}", flush=True)

    def earlier(self, part: str) -> dict[str, dict[str, Any]]:
        """The results of another part so far, by name."""
        return latest(read_objects(self.results)).get(part, {})

    def attempt(self, name: str, work: Callable[[], Mapping[str, Any]]) -> bool:
        """Reports what ``work`` returns, or the last lines of its error; returns whether it worked.

        One measurement that fails, for want of memory for example, must not end the part.
        """
        try:
            values = work()
        except Exception as error:
            traceback.print_exc()
            said = "".join(traceback.format_exception_only(error)).strip()
            self.report(name, error=said[-500:])
            return False
        self.report(name, **values)
        return True


def run(part: str, perform: Callable[[Job], None], arguments: Sequence[str] | None = None) -> int:
    """Performs a part in this process; called by its module."""
    parser = argparse.ArgumentParser(prog=f"python -m gpu.{part}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    chosen = parser.parse_args(arguments)
    deadline = monotonic() + chosen.seconds
    perform(Job(part, chosen.device, chosen.small, chosen.results, deadline))
    return 0


def main(part: str, perform: Callable[[Job], None]) -> None:
    """Performs a part and ends the process."""
    sys.exit(run(part, perform))


# ---- the file of results


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a line of JSON, whole or not at all."""
    with path.open("a") as file:
        file.write(json.dumps(plain(record)) + "\n")


def latest(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Part -> name -> its newest result; what an earlier run of a part left is dropped."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        part, name = record["part"], record["name"]
        if name == "began":
            found[part] = {}
        found.setdefault(part, {}).pop(name, None)
        values = {key: value for key, value in record.items() if key not in ("part", "name")}
        found[part][name] = values
    return found


def plain(value: Any) -> Any:
    """As JSON can hold it: NaN becomes null, floats keep six digits."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
