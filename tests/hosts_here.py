"""pdsh and ssh that run on this machine whatever they are asked to run on a host."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

PDSH = """
import subprocess, sys, threading
hosts, command = sys.argv[-2:]
domains = {host.partition(".")[2] for host in hosts.split(",") if not host[0].isdigit()}
def run(host):
    # As pdsh does: a domain that all share is left out.
    label = host.partition(".")[0] if len(domains) == 1 else host
    script = command.replace("%h", host).replace("%%", "%")
    process = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        print(f"{label}: {line}", end="", flush=True)
    if process.wait():
        print(f"pdsh@here: {label}: ssh exited with exit code {process.returncode}", flush=True)
threads = [threading.Thread(target=run, args=(host,)) for host in hosts.split(",")]
[thread.start() for thread in threads]
"""
SSH = """
import os, pathlib, sys
host, script = sys.argv[-2:]
with open(os.environ["SSH_CALLS"], "a") as calls:
    print(*sys.argv[1:], file=calls)
if pathlib.Path(os.environ["SSH_CALLS"] + "." + host + ".away").exists():
    sys.exit("ssh: connect to host " + host + " port 22: No route to host")
os.execvp("sh", ["sh", "-c", script])  # killed, it ends, as a connection does
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts them first on the PATH. A host is away while a file ``calls.HOST.away`` is there.

    What ssh was called with is in the file ``calls``.
    """
    programs = folder / "programs"
    programs.mkdir()
    for name, text in (("pdsh", PDSH), ("ssh", SSH)):
        (programs / name).write_text(f"#!{sys.executable} -S\n{text}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SSH_CALLS", str(folder / "calls"))
