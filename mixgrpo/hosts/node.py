"""One host's part: ``python -m mixgrpo.hosts.node FILE`` starts its processes and watches them.

The processes end when a signal requests it, when another host has failed or is lost, and when the
connection that started them closes: whatever fails elsewhere, nothing is left running.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from mixgrpo.hosts.job import MARK, PARENT, Node, take
from mixgrpo.hosts.link import HostEnded, HostLost, Link, NotMet, open_link

LOST = 75  # exit code: another host no longer answers; "try again" in sysexits.h
ECHO = 76  # exit code: another host has failed
# Exit codes that are not failures.
STOPPED = (0, *(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)))
FAILED_PATIENCE = 5  # seconds for processes to notice that others have failed
CONTROL = "::mixgrpo "  # prefix of the lines that are meant for the supervisor


@dataclass(frozen=True)
class Asked:
    """A signal asked the job to stop; SIGQUIT asks it to stop immediately."""

    signal: int


@dataclass(frozen=True)
class Ended:
    """The processes of this host have ended."""

    exit_code: int


Event = Asked | Ended | HostEnded


def main(path: str) -> int:
    """Runs the part described in the file; returns the exit code."""
    node = take(Path(path))
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    listen_to_signals(events)
    threading.Thread(target=_await_closing, args=(events,), daemon=True).start()
    say(f"{CONTROL}pid {os.getpid()}")
    code = run(node, events)
    say(f"{CONTROL}exit {code}")
    return code


def listen_to_signals(events: queue.SimpleQueue[Event]) -> None:
    """Turns the signals that stop the job into events."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda given, frame: events.put(Asked(_as_stop(given))))


def run(node: Node, events: queue.SimpleQueue[Event]) -> int:
    """Connects to the other hosts and runs this host's processes; returns the exit code."""
    kill_marked(node.mark)  # processes left by an earlier attempt
    try:
        link = open_link(node, lambda: not events.empty()) if len(node.hosts) > 1 else Link({})
    except NotMet:
        asked = events.get()  # at this point, no other source sends events
        return 128 + (asked.signal if isinstance(asked, Asked) else signal.SIGTERM)
    except (HostLost, OSError) as error:
        say(f"error: {error}")
        return LOST
    link.watch(events.put)
    process = subprocess.Popen(
        command(node),
        cwd=node.folder,
        env=environment(node, os.environ, link.interface() if link.peers else None),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # signals to this process's group are passed on once, from here
    )
    reader = threading.Thread(target=_pass_on, args=(process,), daemon=True)
    reader.start()
    threading.Thread(target=lambda: events.put(Ended(process.wait())), daemon=True).start()
    code = _follow(process, events, node)
    kill_marked(node.mark)
    reader.join(timeout=5)
    link.tell(code)
    return code


def _follow(process: subprocess.Popen[bytes], events: queue.SimpleQueue[Event], node: Node) -> int:
    """Waits until the processes end, or ends them; returns the exit code."""
    deadline, code, asked = float("inf"), 1, False
    while True:
        try:
            event = events.get(timeout=min(max(0.0, deadline - monotonic()), 1e6))
        except queue.Empty:
            return code
        match event:
            case Ended(exit_code):
                return exit_code if exit_code >= 0 else 128 - exit_code
            case Asked(signal.SIGQUIT):
                return 128 + signal.SIGKILL
            case Asked(number) if not asked:  # a second signal would keep them from saving
                process.send_signal(number)
                asked = True
                deadline, code = monotonic() + node.grace + FAILED_PATIENCE, 128 + number
            case HostEnded(host, None, why):
                say(f"error: {node.host} lost {host} ({why}); its processes end")
                return LOST
            case HostEnded(_, exit_code) if exit_code not in STOPPED:
                deadline, code = monotonic() + FAILED_PATIENCE, ECHO


def command(node: Node) -> list[str]:
    """The command to run on this host: its part of a launch, or a single-process program."""
    python = [sys.executable, "-m"]
    if node.program != "mixgrpo":
        return [*python, node.program, *node.words]
    several = ["--nnodes", str(len(node.hosts)), "--node_rank", str(node.rank)]
    meeting = ["--master_addr", node.hosts[0], "--master_port", str(node.port)]
    return [
        *python,
        *("mixgrpo", "launch", "--nproc_per_node", str(node.slots or processes_here())),
        *([*several, *meeting] if len(node.hosts) > 1 else []),
        *node.words,
    ]


def environment(node: Node, own: Mapping[str, str], interface: str | None) -> dict[str, str]:
    """This machine's environment, overridden by that of the job."""
    # Otherwise gloo uses the address of the machine's own host name, often 127.0.1.1.
    found = {"GLOO_SOCKET_IFNAME": interface} if interface else {}
    place = {
        "RANK": str(node.rank),
        "WORLD_SIZE": str(len(node.hosts)),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": node.hosts[0],
        "MASTER_PORT": str(node.port),
    }
    alone = place if node.program != "mixgrpo" else {}  # `launch` sets these for its processes
    parent = str(os.getpid())
    return {**own, **found, **node.environment, **alone, MARK: node.mark, PARENT: parent}


def kill_marked(mark: str) -> None:
    """Kills every process of this user that has the mark in its environment, and sees them end.

    Until then a killed process holds its ports and its GPU's memory. One that the system cannot
    end, because its disk does not answer, say, is not waited for beyond ``FAILED_PATIENCE``.
    """
    wanted = f"{MARK}={mark}".encode()
    deadline, killed = monotonic() + FAILED_PATIENCE, set[Path]()
    while True:
        found = {process for process in Path("/proc").glob("[0-9]*") if _has(process, wanted)}
        for process in found:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                os.kill(int(process.name), signal.SIGKILL)
        killed |= found  # one that is ending has no environment any more
        if all(has_ended(process) for process in killed) or monotonic() > deadline:
            return
        sleep(0.02)


def _has(process: Path, variable: bytes) -> bool:
    """Whether a process, by its folder in /proc, has it in its environment."""
    try:
        return variable in (process / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return False


def has_ended(process: Path) -> bool:
    """Whether a process, by its folder in /proc, is gone or only waits for its parent to hear."""
    try:
        after_name = (
            (process / "stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()
        )
    except OSError:
        return True
    state, threads = after_name[0], int(after_name[17])
    return state in "ZX" and threads <= 1  # else the first thread has ended before others


def say(line: str) -> None:
    """Prints a line; does nothing if the output has been closed."""
    with contextlib.suppress(OSError):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def lines_of(stream: Iterator[bytes]) -> Iterator[str]:
    """The lines of a stream of chunks; carriage returns of progress bars also end lines."""
    rest = b""
    for chunk in stream:
        *whole, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
        yield from (line.decode(errors="replace") for line in whole if line.strip())
    if rest.strip():
        yield rest.decode(errors="replace")


def _pass_on(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    handle = process.stdout.fileno()
    for line in lines_of(iter(lambda: os.read(handle, 65536), b"")):
        say(line)


def _await_closing(events: queue.SimpleQueue[Event]) -> None:
    """Stops the job when the connection, and so the standard input, closes."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    events.put(Asked(signal.SIGTERM))


def _as_stop(number: int) -> int:
    return signal.SIGTERM if number == signal.SIGHUP else number


def processes_here() -> int:
    """Number of processes on this machine: one per GPU, or one on the CPU."""
    import torch

    return max(1, torch.cuda.device_count())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
