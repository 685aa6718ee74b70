"""Starts a job on all hosts, forwards their output, stops it and restarts it."""

from __future__ import annotations

import ctypes
import os
import queue
import re
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from time import monotonic, sleep, strftime
from typing import TextIO

from mixgrpo.hosts.job import Node
from mixgrpo.hosts.node import CONTROL, ECHO, FAILED_PATIENCE, LOST, STOPPED, lines_of
from mixgrpo.hosts.remote import (
    Unreachable,
    deliver,
    on_all,
    on_host,
    pdsh_command,
    pdsh_environment,
    withdraw,
)

SSH_FAILED = 255  # ssh's exit code if the connection, not the command, has failed
RETRY = 3  # seconds between attempts to reach a host
_prctl = ctypes.CDLL(None).prctl
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SAID = re.compile(r"(?P<host>[\w.-]+): (?P<text>.*)")
_SSH_ENDED = re.compile(r"pdsh@\S+: (?P<host>\S+): .* exited with exit code (?P<code>\d+)")
_ERROR = re.compile(r"error\b.*[^:]|[\w.]*(Error|Exception|Interrupt)\b.*")


@dataclass
class Attempt:
    """What is known about one attempt, by host."""

    pids: dict[str, int] = field(default_factory=dict)
    exit_codes: dict[str, int] = field(default_factory=dict)  # in the order in which hosts ended
    errors: list[tuple[str, str]] = field(default_factory=list)  # host and line, in order

    @property
    def failed(self) -> list[str]:
        """The hosts that failed, in order of failure."""
        return [host for host, code in self.exit_codes.items() if code not in STOPPED]

    @property
    def failed_alone(self) -> list[str]:
        """The hosts that failed on their own: not because of another host, and not killed."""
        others = (LOST, ECHO, SSH_FAILED, 128 + signal.SIGKILL)
        return [host for host in self.failed if self.exit_codes[host] not in others]

    @property
    def has_lost_a_host(self) -> bool:
        return any(code in (LOST, SSH_FAILED) for code in self.exit_codes.values())

    @property
    def exit_code(self) -> int:
        """The exit code of the first host that failed on its own; otherwise the largest code."""
        own = [self.exit_codes[host] for host in self.failed_alone]
        return own[0] if own else max(self.exit_codes.values(), default=0)

    def reason(self) -> str:
        """Which host failed, and why: the first error that does not report another's failure."""
        echo = re.compile(r"lost another process of this run|its processes end$")
        errors = [e for e in self.errors if not echo.search(e[1])] or self.errors
        host = errors[0][0] if errors else (self.failed or ["a host"])[0]
        said = errors[0][1] if errors else "it printed no error"
        return f"{host} failed (exit code {self.exit_codes.get(host, '?')}): {said}"


@dataclass(frozen=True)
class Job:
    """A job and how it is supervised.

    Attributes:
        nodes: every host's part, as in the first attempt.
        logs: folder for the log of each host.
        max_restarts: maximum number of restarts.
        wait: seconds to wait before a restart for a host that cannot be reached.
        is_worth_restarting: called after a failure in which no host was lost.
        again: returns the words of a restart.
    """

    nodes: list[Node]
    logs: Path
    max_restarts: int
    wait: int
    is_worth_restarting: Callable[[], bool]
    again: Callable[[], list[str]]

    @property
    def hosts(self) -> list[str]:
        return [node.host for node in self.nodes]

    @cached_property
    def labels(self) -> dict[str, str]:
        """The label that pdsh prints for each host -> its name. pdsh omits a shared domain."""
        short = Counter(_short(host) for host in self.hosts)
        shortened = {_short(host): host for host in self.hosts if short[_short(host)] == 1}
        return {**shortened, **{host: host for host in self.hosts}}


class Supervisor:
    """Runs a job to its end. ``stop`` may be called from a signal handler."""

    def __init__(self, job: Job, say: Callable[[str], None]) -> None:
        self.job = job
        self.say = say
        self.asked: int | None = None
        self._events: queue.SimpleQueue[str | int | None] = queue.SimpleQueue()

    def stop(self, number: int) -> None:
        """Asks the job to stop; a second call stops it immediately."""
        self._events.put(number)

    def run(self) -> int:
        """Runs the job, restarting it where that may help; returns the exit code."""
        for attempt in range(self.job.max_restarts + 1):
            again = self.job.again() if attempt else []
            nodes = [_of_attempt(node, attempt, again) for node in self.job.nodes]
            seen = Attempt()
            try:
                missing = self._deliver(nodes, self.job.wait if attempt else 0)
                if missing:
                    self.say(f"error: {missing}")
                    return SSH_FAILED
                if self.asked is None:
                    self._attempt(nodes, seen)
            finally:
                untaken = [host for host in self.job.hosts if host not in seen.pids]
                on_all(untaken, lambda host: withdraw(self.job.nodes[0].job, host))
            is_done = bool(seen.exit_codes) and not any(seen.exit_codes.values())
            if self.asked is not None and not is_done:
                if seen.failed_alone:  # for example while saving
                    self.say(f"error: {seen.reason()}")
                    return seen.exit_code
                return 128 + self.asked
            if not seen.failed:
                return seen.exit_code
            self.say(f"error: {seen.reason()}")
            if not (seen.has_lost_a_host or self.job.is_worth_restarting()):
                break
            if attempt < self.job.max_restarts:
                self.say(f"restart {attempt + 1} of {self.job.max_restarts}")
        self.say(f"logs of each host: {self.job.logs}")
        return seen.exit_code

    # ---- before an attempt

    def _deliver(self, nodes: list[Node], wait: int) -> str:
        """Sends every host its part; returns a message about the hosts that cannot be reached."""
        parts = {node.host: node for node in nodes}
        left = list(parts)
        deadline, told_of = monotonic() + wait, ""
        while True:
            results = on_all(left, lambda host: deliver(parts[host]))
            away = {h: str(r) for h, r in results.items() if isinstance(r, Unreachable)}
            left = list(away)
            if not away or self._was_asked():
                return ""
            listed = "; ".join(f"{host}: {why}" for host, why in away.items())
            if monotonic() > deadline:
                waited = f" within {wait} s" if wait else ""
                return (
                    f"not reached{waited}: {listed}; `ssh HOST true` must work without a "
                    "password; bash scripts/hosts/check.sh shows what is wrong"
                )
            if ", ".join(away) != told_of:
                told_of = ", ".join(away)
                self.say(f"waiting up to {wait} s for {told_of}")
            sleep(RETRY)

    def _was_asked(self) -> bool:
        while not self._events.empty():
            event = self._events.get()
            self.asked = event if isinstance(event, int) else self.asked
        return self.asked is not None

    # ---- an attempt

    def _attempt(self, nodes: list[Node], seen: Attempt) -> None:
        with _logs(self.job.logs, self.job.hosts, nodes[0].attempt, self.say) as log:
            pdsh = subprocess.Popen(
                pdsh_command(self.job.hosts, nodes[0].job),
                env=pdsh_environment(nodes[0].lost_after),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that only this process receives and forwards Ctrl-C
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call
            )
            reader = threading.Thread(target=self._read, args=(pdsh,), daemon=True)
            reader.start()
            try:
                self._follow(seen, nodes[0], log)
            finally:
                _end(pdsh)
                reader.join(timeout=FAILED_PATIENCE)
                self._was_asked()  # empties the queue, so that no event reaches the next attempt
        for host in self.job.hosts:
            seen.exit_codes.setdefault(host, SSH_FAILED)

    def _read(self, pdsh: subprocess.Popen[bytes]) -> None:
        assert pdsh.stdout is not None
        handle = pdsh.stdout.fileno()
        for line in lines_of(iter(lambda: os.read(handle, 65536), b"")):
            self._events.put(line)
        self._events.put(None)

    def _follow(self, seen: Attempt, node: Node, log: Callable[[str, str], None]) -> None:
        """Processes the hosts' output until all have ended or their time is up."""
        deadline, is_late = float("inf"), False
        while True:
            try:
                event = self._events.get(timeout=min(max(0.0, deadline - monotonic()), 1e6))
            except queue.Empty:
                if is_late:
                    return
                self._signal(seen, signal.SIGQUIT)
                deadline, is_late = monotonic() + FAILED_PATIENCE, True
                continue
            if event is None:
                return
            if isinstance(event, int):
                is_first = self.asked is None
                self.asked = event
                self._signal(seen, event if is_first else signal.SIGQUIT)
                deadline = monotonic() + 2 * FAILED_PATIENCE + (node.grace if is_first else 0)
                continue
            self._take_in(event, seen, log)
            if seen.failed and deadline == float("inf"):
                # The others notice through their link or through a timeout of this connection.
                deadline = monotonic() + 2 * node.lost_after + 2 * FAILED_PATIENCE

    def _take_in(self, line: str, seen: Attempt, log: Callable[[str, str], None]) -> None:
        ended, said = _SSH_ENDED.fullmatch(line), _SAID.fullmatch(line)
        labels = self.job.labels
        if ended is not None and ended["host"] in labels:
            seen.exit_codes.setdefault(labels[ended["host"]], int(ended["code"]))
            return
        if said is None or said["host"] not in labels:
            self.say(line)
            return
        host, text = labels[said["host"]], said["text"]
        if text.startswith(CONTROL):
            kind, number = text.removeprefix(CONTROL).split()
            if kind == "pid":
                seen.pids[host] = int(number)
                if self.asked is not None:  # the stop came before the pid was known
                    self._signal(seen, self.asked)
            else:
                seen.exit_codes.setdefault(host, int(number))
            return
        if _ERROR.fullmatch(text):
            seen.errors.append((host, text))
        self.say(line)
        log(host, text)

    def _signal(self, seen: Attempt, number: int) -> None:
        running = [host for host in seen.pids if host not in seen.exit_codes]
        if running:
            on_all(running, lambda host: on_host(host, f"kill -{number} {seen.pids[host]}"))


def _of_attempt(node: Node, attempt: int, again: list[str]) -> Node:
    if attempt == 0:
        return node
    # A new port, so that processes still running on a lost host do not join the new ones.
    return replace(node, attempt=attempt, port=node.port + 2 * attempt, words=again)


@contextmanager
def _logs(
    folder: Path, hosts: list[str], attempt: int, say: Callable[[str], None]
) -> Iterator[Callable[[str, str], None]]:
    """A function that appends a line to a host's log. If that fails, it warns once, since a log
    that cannot be written must not end the job."""
    files: dict[str, TextIO] = {}
    is_told = False

    def write(host: str, text: str) -> None:
        nonlocal is_told
        try:
            if host not in files:
                folder.mkdir(parents=True, exist_ok=True)
                files[host] = (folder / f"{host}.log").open(
                    "a", buffering=1, encoding="utf-8", errors="backslashreplace"
                )
            print(text, file=files[host])
        except OSError as error:
            if not is_told:
                say(f"warning: the logs in {folder} are incomplete ({error}); the job continues")
            is_told = True

    for host in hosts:
        write(host, f"---- {strftime('%Y-%m-%d %H:%M:%S')}, attempt {attempt + 1}")
    try:
        yield write
    finally:
        for file in files.values():
            with suppress(OSError):
                file.close()


def _short(host: str) -> str:
    """The host name without its domain; an IP address is unchanged."""
    return host if host[0].isdigit() or ":" in host else host.partition(".")[0]


def _die_with_parent() -> None:
    """Otherwise pdsh, and with it the job, would outlive a supervisor that is killed."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(pdsh: subprocess.Popen[bytes]) -> None:
    """Ends pdsh and its ssh processes. The remote processes end when their input closes."""
    if pdsh.poll() is None:
        os.killpg(pdsh.pid, signal.SIGKILL)
    pdsh.wait()
