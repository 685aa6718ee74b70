"""Compares the hosts of a run: a table, and a remedy for each difference that matters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time

from mixgrpo.files.named_paths import find_path
from mixgrpo.hosts.facts import Facts
from mixgrpo.hosts.remote import ROOT, ROOT_COMMAND, Unreachable, on_all, on_host

CLOCKS_APART = 1.0  # seconds; larger clock differences are reported
FACTS_WITHIN = 300  # seconds, for many large files on a slow disk


@dataclass(frozen=True)
class Report:
    """What is known about one host.

    Attributes:
        clock: seconds by which its clock is ahead; 0 if network latency can explain the difference.
        facts: None if the host could not be queried.
        fault: why it could not be queried.
    """

    clock: float = 0.0
    facts: Facts | None = None
    fault: str = ""


def ask(hosts: Sequence[str], folder: str, paths: list[str]) -> dict[str, Report]:
    """Queries all hosts at the same time; returns each host's report."""

    def report(host: str) -> Report:
        try:
            clock = clock_ahead(host)
        except (Unreachable, ValueError) as error:
            return Report(fault=f"not reached ({error}); {_REACH}")
        try:
            question = json.dumps({"folder": folder, "paths": paths})
            answer = on_host(host, f"{ROOT_COMMAND} -m mixgrpo.hosts.facts", question, FACTS_WITHIN)
            return Report(clock, Facts(**json.loads(answer)))
        except (Unreachable, ValueError, TypeError) as error:
            return Report(clock, fault=f"mixgrpo does not run there ({error}); {_INSTALL}")

    return {
        host: Report(fault=str(found)) if isinstance(found, Unreachable) else found
        for host, found in on_all(hosts, report).items()
    }


_REACH = (
    "`ssh HOST true` must work from here without a password: check the name, ssh-copy-id, and that "
    "sshd runs there"
)
_INSTALL = f"clone the same repository to {ROOT} there and run bash env_setup.sh in it"


def clock_ahead(host: str) -> float:
    """Seconds by which a host's clock is ahead; 0 if its time lies between request and answer.

    Raises:
        Unreachable: see ``on_host``.
    """
    before = time()
    there = float(on_host(host, "date +%s.%N"))
    after = time()
    return min(there - before, 0.0) if there < before else max(there - after, 0.0)


def complaints(reports: Mapping[str, Report], paths: Sequence[str]) -> Iterator[str]:
    """One line per problem; hosts are compared with the first one that answered."""
    asked = {host: report.facts for host, report in reports.items() if report.facts is not None}
    measure = next(iter(asked), "")
    for host, report in reports.items():
        if report.fault:
            yield f"{host}: {report.fault.replace('HOST', host)}"
        if abs(report.clock) > CLOCKS_APART:
            side = "ahead" if report.clock > 0 else "behind"
            yield (
                f"{host}: its clock is {abs(report.clock):.1f} s {side}; start a time service "
                "there (Debian, Ubuntu: apt install chrony)"
            )
        if report.facts is not None:
            yield from _differences(host, report.facts, measure, asked[measure], paths)


def _differences(
    host: str, facts: Facts, measure: str, expected: Facts, paths: Sequence[str]
) -> Iterator[str]:
    if facts.python != expected.python:
        yield (
            f"{host}: Python {facts.python}, {measure} has {expected.python}; run "
            f"PYTHON=/path/to/python{expected.python.rpartition('.')[0]} bash env_setup.sh there"
        )
    for name, installed in facts.packages.items():
        wanted = expected.packages.get(name, "none")
        if installed != wanted or installed == "none":
            yield (
                f"{host}: {name} {installed}, {measure} has {wanted}; run bash env_setup.sh there"
            )
    if facts.revision != expected.revision:
        yield (
            f"{host}: revision {facts.revision}, {measure} has {expected.revision}; commit, then "
            "git pull there"
        )
    for path in paths:
        here, there = facts.files[path], expected.files[path]
        if here == "missing":
            yield (
                f"{host}: {path} is missing; bash scripts/download_models.sh, or copy it from a "
                "host that has it"
            )
        elif there not in (here, "missing"):
            yield (
                f"{host}: {path} is {here}, {measure} has {there}; copy the correct one to the "
                "other host"
            )
    for what, is_, wanted in (
        ("GPUs", facts.gpus, expected.gpus),
        ("driver", facts.driver, expected.driver),
    ):
        if is_ != wanted:
            yield (
                f"{host}: {what} {is_}, {measure} has {wanted}; set slots=N in the hostfile for "
                "unequal GPUs, and install the same driver"
            )


def table(reports: Mapping[str, Report]) -> str:
    """A table with one row per host."""
    head = ["host", "reached", "Python", "packages", "revision", "data", "clock", "GPUs", "driver"]
    rows = [head, *(_row(host, report) for host, report in reports.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _row(host: str, report: Report) -> list[str]:
    facts = report.facts
    if facts is None:
        return [host, "no" if "not reached" in report.fault else "yes", *["?"] * 7]
    installed = [version for version in facts.packages.values() if version != "none"]
    there = [found for found in facts.files.values() if found != "missing"]
    return [
        *(host, "yes", facts.python, f"{len(installed)} of {len(facts.packages)}"),
        facts.revision[:8] + ("-dirty" if "-dirty" in facts.revision else ""),
        f"{len(there)} of {len(facts.files)}",
        *(f"{report.clock:+.1f} s", facts.gpus, facts.driver),
    ]


def data_paths(knobs: Mapping[str, object], folder: Path) -> list[str]:
    """The files and folders that a configuration (dotted path -> value) names.

    The values of rewards may be model names instead; they are included if they are paths here.
    """
    always = ("batch.prompts_file", "validation.prompts_file", "model.path", "text.embeddings")
    named = [str(knobs[key]) for key in always if knobs.get(key)]
    perhaps = [
        str(value)
        for key, value in knobs.items()
        if key.startswith("rewards.") and key.endswith((".model", ".checkpoint")) and value
    ]
    return list(
        dict.fromkeys([*named, *(p for p in perhaps if "/" in p or find_path(str(folder / p)))])
    )
