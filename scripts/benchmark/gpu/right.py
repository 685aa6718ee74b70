"""It is right: the tests that are marked ``gpu``, each reported as soon as it has run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gpu.job import Job, main

ROOT = Path(__file__).resolve().parents[3]
TESTS = "tests/test_gpu.py"


class Recorder:
    """A pytest plugin that reports every test, with the last lines of what went wrong."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def pytest_runtest_logreport(self, report: Any) -> None:
        # A test that fails or is skipped while it is set up has no call.
        if report.when != "call" and report.outcome == "passed":
            return
        said = {}
        if report.outcome != "passed":
            lines = [line for line in report.longreprtext.splitlines() if line.strip()]
            said["error"] = "\n".join(lines[-4:])[-800:]
        name = report.nodeid.rpartition("::")[2]
        self.job.report(name, outcome=report.outcome, seconds=report.duration, **said)


def perform(job: Job) -> None:
    os.chdir(ROOT)  # the recipes name the files of data/shapes from there
    # Its processes are all on this machine, whose name may lead nowhere without a network.
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu", "--device", job.device]
    code = pytest.main([*words, TESTS], plugins=[Recorder(job)])
    job.report("tests", exit_code=int(code))


if __name__ == "__main__":
    main("right", perform)
