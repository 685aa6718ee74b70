"""Several hosts on one machine: network namespaces with an address and an sshd each."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.213.77"
NAMES = ("first", "second")
PROGRAMS = ("pdsh", "sshd", "ssh", "ssh-keygen", "ip")
SSHD = """
ListenAddress {address}
HostKey {root}/host_key
AuthorizedKeysFile {root}/key.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin prohibit-password
PasswordAuthentication no
"""
SSH = """
IdentityFile {root}/key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
KexAlgorithms curve25519-sha256
"""


def missing() -> str:
    """Why there can be no hosts here; nothing if there can."""
    if os.getuid() != 0:
        return "network namespaces need root"
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if absent:
        return f"no {', '.join(absent)} here (apt install pdsh openssh-server iproute2)"
    probe = f"mixgrpo-probe-{os.getpid()}"
    made = subprocess.run(
        ["ip", "netns", "add", probe], capture_output=True, text=True, check=False
    )
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return made.stderr.strip()


@dataclass(frozen=True)
class Hosts:
    """Two hosts on a bridge, and a place on it from which they are used.

    Attributes:
        root: keys and settings of ssh.
        login: the namespace from which they are used.
    """

    root: Path
    login: str

    def inside(self, *command: str) -> list[str]:
        """The command, run where the hosts can be reached."""
        return ["ip", "netns", "exec", self.login, *command]

    @property
    def environment(self) -> dict[str, str]:
        return {"PDSH_SSH_ARGS_APPEND": f"-F {self.root}/ssh_config"}

    def cut_off(self, number: int) -> None:
        """Pulls a host's cable: what is sent to it or by it is lost without a word."""
        _ip("-n", self.login, "link", "set", f"port{number}", "down")

    def bring_back(self, number: int) -> None:
        _ip("-n", self.login, "link", "set", f"port{number}", "up")


@contextmanager
def two_hosts(root: Path) -> Iterator[Hosts]:
    """Makes the hosts ``NAMES``; afterwards nothing of them is left."""
    job = f"mixgrpo-{os.getpid()}"
    hosts = Hosts(root, f"{job}-login")
    servers: list[subprocess.Popen[bytes]] = []
    namespaces = [hosts.login, *(f"{job}-{name}" for name in NAMES)]
    _remove(namespaces)  # of a killed process that had this one's number
    try:
        _make_keys(root)
        for namespace in namespaces:
            _make(namespace)
        _ip("-n", hosts.login, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hosts.login, "addr", "add", f"{NETWORK}.254/24", "dev", "bridge")
        _ip("-n", hosts.login, "link", "set", "bridge", "up")
        for number, namespace in enumerate(namespaces[1:]):
            _plug_in(hosts.login, namespace, number)
            servers.append(_serve(namespace, root, number))
        for name in NAMES:
            _await(hosts, name)
        yield hosts
    finally:
        for server in servers:
            server.kill()
            server.wait()
        _remove(namespaces)


def _make(namespace: str) -> None:
    """A namespace in which the hosts' names mean something, and no name server is asked."""
    own = Path("/etc/netns") / namespace
    own.mkdir(parents=True)
    names = [f"{_address(number)} {name}" for number, name in enumerate(NAMES)]
    (own / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
    (own / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
    _ip("netns", "add", namespace)
    _ip("-n", namespace, "link", "set", "lo", "up")


def _remove(namespaces: list[str]) -> None:
    for namespace in namespaces:
        subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
        shutil.rmtree(f"/etc/netns/{namespace}", ignore_errors=True)


def _address(number: int) -> str:
    return f"{NETWORK}.{number + 1}"


def _plug_in(login: str, namespace: str, number: int) -> None:
    port = f"port{number}"
    _ip("-n", login, "link", "add", port, "type", "veth", "peer", "eth0", "netns", namespace)
    _ip("-n", login, "link", "set", port, "master", "bridge", "up")
    _ip("-n", namespace, "addr", "add", f"{_address(number)}/24", "dev", "eth0")
    _ip("-n", namespace, "link", "set", "eth0", "up")


def _make_keys(root: Path) -> None:
    for name in ("key", "host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)]
        subprocess.run(command, check=True)
    (root / "ssh_config").write_text(SSH.format(root=root))


def _serve(namespace: str, root: Path, number: int) -> subprocess.Popen[bytes]:
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd will not start without
    settings = root / f"sshd_{number}"
    settings.write_text(SSHD.format(root=root, address=_address(number)))
    sshd = ["/usr/sbin/sshd", "-D", "-f", str(settings), "-E", str(root / f"sshd_{number}.log")]
    return subprocess.Popen(["ip", "netns", "exec", namespace, *sshd])


def _await(hosts: Hosts, name: str) -> None:
    command = hosts.inside("ssh", "-F", str(hosts.root / "ssh_config"), name, "true")
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        assert time.monotonic() < deadline, f"{name}: {done.stderr}"
        time.sleep(0.1)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
