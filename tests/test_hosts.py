"""Several hosts, in parts: files, words, links; and whole, with a pdsh that stays here."""

from __future__ import annotations

import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hosts_here
import pytest
from tiny_world import ROOT
from trainings import free_port

from mixgrpo.commands import main
from mixgrpo.commands.hosts import _progress, _restarts
from mixgrpo.commands.launch import parse_command
from mixgrpo.hosts import node as nodes
from mixgrpo.hosts import remote, slurm
from mixgrpo.hosts.environment import forwarded, read_settings
from mixgrpo.hosts.hostfile import Host, is_this_machine, read_hostfile
from mixgrpo.hosts.job import Node, node_file, take
from mixgrpo.hosts.link import HostEnded, HostLost, Link, open_link
from mixgrpo.hosts.supervise import Attempt, Job, Supervisor

CANARY = "canary0123456789canary0123456789canary01"
WORDS = ["it's", 'a "b" $HOME `x` %h %n %%', "", "*", "--a={'c': 1}", "ü\t!"]

# ---- the hostfile


def hostfile(folder: Path, text: str) -> Path:
    (folder / "hostfile").write_text(text)
    return folder / "hostfile"


def test_a_hostfile_is_read_in_its_order(tmp_path):
    text = "# two nodes\n\nnode-2 slots=8\n  node-1.cluster\tslots=4  # half of it\n10.0.0.3\n"
    expected = [Host("node-2", 8), Host("node-1.cluster", 4), Host("10.0.0.3")]
    assert read_hostfile(hostfile(tmp_path, text)) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# none\n", "names no host; write one per line"),
        ("a\nb\na slots=2\n", "names a 2 times; write it once, with slots=N"),
        ("a\nb slots=two\n", r"line 2 is not a host; write NAME, or NAME slots=N"),
        ("a slots=0\n", "line 1 is not a host"),
        ("a slots=1 slots=2\n", "is not a host"),
        ("a 8\n", "is not a host"),
        ("me@a\n", r"user names and ports belong in ~/.ssh/config"),
        ("-oProxyCommand=x\n", "is not a host"),
        ("node-[1-4]\n", "is not a host"),
        ("localhost\na\n", "names localhost together with other hosts"),
    ],
)
def test_hostfiles_that_cannot_be(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        read_hostfile(hostfile(tmp_path, text))


def test_no_hostfile(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no hostfile .*; write one"):
        read_hostfile(tmp_path / "hostfile")


def test_the_shipped_hostfile_is_this_machine():
    assert is_this_machine(read_hostfile(ROOT / "hosts" / "hostfile"))


def test_which_hosts_are_this_machine_alone():
    own = socket.gethostname()
    assert is_this_machine([Host("localhost", 8)])
    assert is_this_machine([Host(own)])
    assert not is_this_machine([Host("another-machine")])
    assert not is_this_machine([Host(own), Host("another-machine")])


# ---- the environment, and the file in which it travels


def test_what_belongs_to_one_machine_stays_there():
    own = {"PATH": "/x", "HOME": "/root", "SSH_AUTH_SOCK": "/y", "RANK": "3", "SLURM_JOB_ID": "1"}
    given = {"WANDB_API_KEY": CANARY, "HF_HOME": "/data", "CUDA_VISIBLE_DEVICES": "", "A": "é\n"}
    settings = {"NCCL_DEBUG": "WARN", "HF_HOME": "/other"}
    assert forwarded({**own, **given}, settings) == {"NCCL_DEBUG": "WARN", **given}


def test_settings_are_read_and_shipped(tmp_path):
    file = tmp_path / "nccl.env"
    file.write_text("# a comment\n\n  NCCL_A=1 = 2 \nB=\n")
    assert read_settings(file) == {"NCCL_A": "1 = 2", "B": ""}
    assert read_settings(tmp_path / "none") == {}
    assert read_settings(ROOT / "hosts" / "nccl.env") == {"NCCL_DEBUG": "WARN"}
    file.write_text(f"A=1\nexport WANDB_API_KEY={CANARY}\n")
    with pytest.raises(
        ValueError, match="line 2: 'export WANDB_API_KEY' is not a setting"
    ) as error:
        read_settings(file)
    assert CANARY not in str(error.value)


def part(rank: int = 0, **changes: object) -> Node:
    fixed = Node(
        job="0a1b", attempt=0, hosts=["127.0.0.1", "127.0.0.2"], rank=rank, slots=2, port=0,
        program="mixgrpo", words=WORDS, environment={"WANDB_API_KEY": CANARY}, folder="/",
        grace=5, lost_after=3, join_within=60,
    )  # fmt: skip
    return replace(fixed, **changes)  # type: ignore[arg-type]


def test_a_part_is_taken_once(tmp_path):
    path = tmp_path / "part.json"
    path.write_text(part().to_json())
    path.chmod(0o600)
    assert take(path) == part()
    with pytest.raises(FileNotFoundError):
        take(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622])
def test_a_part_that_others_could_touch_is_not_used(tmp_path, mode):
    path = tmp_path / "part.json"
    path.write_text(part().to_json())
    path.chmod(mode)
    with pytest.raises(
        PermissionError, match="must belong to this user and be accessible to no other"
    ):
        take(path)
    assert not path.exists()


def test_a_part_is_no_link(tmp_path):
    (tmp_path / "target").write_text(part().to_json())
    (tmp_path / "target").chmod(0o600)
    (tmp_path / "part.json").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic"):
        take(tmp_path / "part.json")
    assert (tmp_path / "target").exists()


# ---- what a host runs


def test_a_host_runs_torchruns_part_of_the_command():
    options = "-m mixgrpo launch --nproc_per_node 2 --nnodes 2 --node_rank 1 "
    options += "--master_addr 127.0.0.1 --master_port 20000"
    assert nodes.command(part(1, port=20000)) == [sys.executable, *options.split(), *WORDS]


def test_one_host_meets_nobody():
    alone = part(hosts=["localhost"], slots=3)
    assert nodes.command(alone)[1:] == ["-m", "mixgrpo", "launch", "--nproc_per_node", "3", *WORDS]


def test_the_jobs_environment_counts_before_the_machines():
    given = nodes.environment(part(), {"A": "1", "WANDB_API_KEY": "theirs"}, "eth7")
    assert given == {
        "A": "1",
        "WANDB_API_KEY": CANARY,
        "GLOO_SOCKET_IFNAME": "eth7",
        "MIXGRPO_NODE": "0a1b/127.0.0.1",
        "MIXGRPO_PARENT": str(os.getpid()),
    }
    chosen = part(environment={"GLOO_SOCKET_IFNAME": "ib0"})
    assert nodes.environment(chosen, {}, "eth7")["GLOO_SOCKET_IFNAME"] == "ib0"


def test_a_progress_bars_returns_end_lines():
    chunks = [b"a\rb", b"c\r\n\xff", b"\n\n", b"last"]
    assert list(nodes.lines_of(iter(chunks))) == ["a", "bc", "\ufffd", "last"]


def test_marked_processes_are_killed_and_no_others():
    """And have ended then, although it takes a moment to give so much memory back."""
    begun = "import time; held = bytearray(2**28); print('begun', flush=True); time.sleep(600)"
    marked, other = (
        subprocess.Popen(
            [sys.executable, "-c", begun],
            env={**os.environ, "MIXGRPO_NODE": mark},
            stdout=subprocess.PIPE,
        )
        for mark in ("job/a", "job/ab")
    )
    with marked, other:
        try:
            assert marked.stdout.readline() == other.stdout.readline() == b"begun\n"
            nodes.kill_marked("job/a")
            assert marked.poll() == -signal.SIGKILL
            assert other.poll() is None
        finally:
            marked.kill()
            other.kill()


# ---- the link


def linked(*parts: Node) -> list[Link]:
    """The links of hosts that meet here, in the order of the parts."""
    links: dict[int, Link] = {}

    def meet(node: Node) -> None:
        links[node.rank] = open_link(node)

    threads = [threading.Thread(target=meet, args=(node,)) for node in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return [links[node.rank] for node in parts]


def test_hosts_tell_each_other_how_they_ended():
    port, hosts = free_port(2), ["127.0.0.1", "b", "c"]
    first, b, c = linked(*(part(rank, port=port, hosts=hosts) for rank in range(3)))
    heard: queue.SimpleQueue[HostEnded] = queue.SimpleQueue()
    for link in (first, b):
        link.watch(heard.put)
    c.tell(143)
    assert heard.get(timeout=60) == HostEnded("c", 143)
    first.tell(3)
    assert heard.get(timeout=60) == HostEnded("127.0.0.1", 3)
    assert first.interface() == "lo"
    b.peers["127.0.0.1"].close()
    c.peers["127.0.0.1"].close()


def test_a_host_that_ends_without_a_word_is_lost():
    port = free_port(2)
    first, second = linked(part(0, port=port), part(1, port=port))
    heard: queue.SimpleQueue[HostEnded] = queue.SimpleQueue()
    first.watch(heard.put)
    second.peers["127.0.0.1"].close()
    assert heard.get(timeout=60).exit_code is None


def test_a_connection_asks_after_its_other_side():
    port = free_port(2)
    first, second = linked(part(0, port=port, lost_after=9), part(1, port=port, lost_after=9))
    for link in (first, second):
        (connection,) = link.peers.values()
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        asked = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT]
        idle, every, times = (connection.getsockopt(socket.IPPROTO_TCP, o) for o in asked)
        assert idle + every * times <= 9
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 9000
        connection.close()


def test_hosts_that_do_not_come_are_named():
    hosts = ["127.0.0.1", "b", "c"]
    with pytest.raises(HostLost, match=r"b, c did not connect to 127.0.0.1:.* a firewall"):
        open_link(part(port=free_port(2), hosts=hosts, join_within=1))


def test_a_first_host_that_is_not_reached_is_named():
    with pytest.raises(HostLost, match=r"127.0.0.2 cannot reach 127.0.0.1:\d+ .*refused"):
        open_link(part(1, port=free_port(2), join_within=0))


def test_another_jobs_host_is_sent_away():
    port = free_port(2)
    stranger = part(1, port=port, job="another")
    late = threading.Thread(target=lambda: open_link(stranger), daemon=True)
    late.start()
    with pytest.raises(HostLost, match=r"127\.0\.0\.2 did not connect"):
        open_link(part(port=port, join_within=2))
    late.join(timeout=10)


# ---- ssh and pdsh


@pytest.fixture
def here(tmp_path, monkeypatch):
    hosts_here.install(tmp_path, monkeypatch)
    return tmp_path


def test_pdsh_gets_no_word_of_the_command():
    words = remote.pdsh_command(["a", "b"], "0a1b")
    assert words[:9] == ["pdsh", "-S", "-b", "-R", "ssh", "-t", "10", "-f", "2"]
    assert words[-3:-1] == ["-w", "a,b"]
    assert words[-1].endswith(f"{shlex.quote(sys.executable)} -m mixgrpo.hosts.node "
                              "/tmp/mixgrpo-0a1b-%h.json")  # fmt: skip


def test_percents_in_a_path_are_not_pdshs(monkeypatch):
    monkeypatch.setattr(remote, "ROOT_COMMAND", "cd '/100%h' && exec python")
    assert remote.pdsh_command(["a"], "0a1b")[-1].startswith("cd '/100%%h' && exec python -m")


def test_ssh_asks_nothing_and_notices_silence(monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F '/a b/config'")
    words = remote.ssh_options(30)
    assert words[:2] == ["-F", "/a b/config"]
    assert {"BatchMode=yes", "ServerAliveInterval=10", "ServerAliveCountMax=3"} < set(words)
    given = remote.pdsh_environment(30)["PDSH_SSH_ARGS_APPEND"]
    assert shlex.split(given) == words


def test_a_missing_pdsh_is_told_of(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no pdsh on this machine.*apt install pdsh"):
        remote.check_tools()


def test_a_part_goes_by_the_standard_input_for_its_owner_alone(here):
    node = part(1, job=f"test{os.getpid()}")
    path = Path(node_file(node.job, node.host))
    path.write_text("left by somebody")
    path.chmod(0o666)
    try:
        remote.deliver(node)
        assert path.stat().st_mode & 0o777 == 0o600
        assert take(path) == node
        assert CANARY not in (here / "calls").read_text()
    finally:
        path.unlink(missing_ok=True)


def test_what_a_host_complains_of_is_passed_on(here):
    with pytest.raises(remote.Unreachable, match=r"^over there$"):
        remote.on_host("a", "echo here; echo over there >&2; exit 3")
    with pytest.raises(remote.Unreachable, match="no answer within 0 s"):
        remote.on_host("a", "sleep 5", timeout=0.2)
    (here / "calls.a.away").touch()
    found = remote.on_all(["a", "b"], lambda host: remote.on_host(host, "echo $((1 + 1))"))
    assert found["b"] == "2\n"
    assert "No route to host" in str(found["a"])


# ---- whole jobs, by the pdsh that stays here


def job(folder: Path, *behaviours: str, **more: object) -> Job:
    """A job of ``hosts_program``; ``more`` replaces fields of its parts or of itself."""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "WANDB_API_KEY": CANARY}
    words = [str(folder), *behaviours]
    common = {"job": f"test{os.getpid()}", "port": free_port(4), "program": "hosts_program"}
    parts = [
        part(rank, **common, words=words, environment=environment, folder=str(folder), grace=20)
        for rank in range(2)
    ]
    whole = Job(
        parts, folder / "logs", 1, 20, is_worth_restarting=lambda: False, again=lambda: words
    )
    return replace(whole, **more)  # type: ignore[arg-type]


def supervised(whole: Job, act: Callable[[Supervisor], None] | None = None) -> tuple[int, str]:
    """Exit code and all that was said."""
    said: list[str] = []
    supervisor = Supervisor(whole, said.append)
    if act is not None:
        threading.Thread(target=act, args=(supervisor,), daemon=True).start()
    code = supervisor.run()
    return code, "\n".join(said)


def stop_when_started(folder: Path) -> Callable[[Supervisor], None]:
    def act(supervisor: Supervisor) -> None:
        await_files(folder / "started_0_0", folder / "started_1_0")
        supervisor.stop(signal.SIGTERM)

    return act


def await_files(*paths: Path) -> None:
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.05)


def is_running(folder: Path) -> bool:
    """Whether a process of the job is left: one that has ended may still be known by its number."""
    files = list(folder.glob("started_*"))
    assert files
    return not all(nodes.has_ended(Path(f"/proc/{file.read_text()}")) for file in files)


def test_all_hosts_run_and_their_words_arrive_as_they_are(here):
    code, said = supervised(job(here, *(f"9:9:{word}" for word in WORDS)))
    assert code == 0
    for host in ("127.0.0.1", "127.0.0.2"):
        line = next(line for line in said.splitlines() if line.startswith(f"{host}: words"))
        assert line == f"{host}: words {' | '.join(f'9:9:{w}' for w in WORDS)}, key {len(CANARY)}"
        log = (here / "logs" / f"{host}.log").read_text()
        assert re.match(r"---- [\d: -]+, attempt 1\nwords ", log)
    assert not list(Path("/tmp").glob(f"mixgrpo-test{os.getpid()}-*"))
    for file in [here / "calls", *(here / "logs").iterdir()]:
        assert CANARY not in file.read_text()


def test_a_host_is_known_by_the_name_that_pdsh_shortens(here):
    host = "node-1.cluster.example"
    whole = job(here, "0:0:fail")
    whole = replace(whole, nodes=[replace(whole.nodes[0], hosts=[host])])
    code, said = supervised(whole)
    assert code == 3
    assert f"error: {host} failed (exit code 3): error: out of luck" in said
    assert "out of luck" in (here / "logs" / f"{host}.log").read_text()


@pytest.mark.parametrize(
    ("hosts", "labels"),
    [
        (["a.x.y", "b.x.y"], {"a": "a.x.y", "b": "b.x.y", "a.x.y": "a.x.y", "b.x.y": "b.x.y"}),
        (["a.x", "a.y"], {"a.x": "a.x", "a.y": "a.y"}),
        (["a", "a.y"], {"a": "a", "a.y": "a.y"}),
        (["10.0.0.1", "10.0.0.2"], {"10.0.0.1": "10.0.0.1", "10.0.0.2": "10.0.0.2"}),
    ],
)
def test_what_pdsh_may_call_a_host(here, hosts, labels):
    whole = job(here)
    parts = [replace(node, hosts=hosts) for node in whole.nodes]
    assert replace(whole, nodes=parts).labels == labels


def test_a_log_that_cannot_be_written_does_not_end_the_job(here):
    (here / "logs").write_text("no folder")
    code, said = supervised(job(here, "9:9:nothing"))
    assert code == 0
    assert said.count("warning: the logs in") == 1
    assert "127.0.0.1: words" in said


def test_a_stop_after_which_a_host_could_not_save_is_a_failure(here):
    code, said = supervised(job(here, "0:0:stay", "1:0:unsaved"), stop_when_started(here))
    assert code == 3
    assert "error: 127.0.0.2 failed (exit code 3): error: out of luck" in said


def test_a_host_that_fails_ends_the_others_and_is_named(here):
    code, said = supervised(job(here, "1:0:fail", "0:0:stay"))
    assert code == 3
    assert "error: 127.0.0.2 failed (exit code 3): error: out of luck" in said
    assert "restart" not in said  # it would fail again
    assert f"logs of each host: {here / 'logs'}" in said
    assert not is_running(here)


def test_a_failure_after_a_checkpoint_is_followed_by_another_attempt(here):
    words = [str(here), "1:0:fail", "again"]
    whole = job(here, "1:0:fail", is_worth_restarting=lambda: True, again=lambda: words)
    code, said = supervised(whole)
    assert code == 0
    assert "restart 1 of 1" in said
    assert "127.0.0.1: words 1:0:fail | again" in said
    assert "attempt 2" in (here / "logs" / "127.0.0.2.log").read_text()


def test_restarts_come_to_an_end(here):
    code, said = supervised(
        job(here, "1:0:fail", "1:1:fail", is_worth_restarting=lambda: True, max_restarts=1)
    )
    assert code == 3
    assert said.count("restart 1 of 1") == 1
    assert said.count("out of luck") == 4  # by the host and in the reason, twice


def test_a_stopped_job_saves_on_every_host(here):
    code, said = supervised(job(here, "0:0:stay", "1:0:stay"), stop_when_started(here))
    assert code == 143
    assert (here / "saved_0").exists()
    assert (here / "saved_1").exists()
    assert "restart" not in said


def test_asked_twice_a_job_ends_at_once(here):
    def act(supervisor: Supervisor) -> None:
        await_files(here / "started_0_0", here / "started_1_0")
        supervisor.stop(signal.SIGINT)
        supervisor.stop(signal.SIGINT)

    assert supervised(job(here, "0:0:deaf", "1:0:deaf"), act)[0] == 130
    assert not is_running(here)


def test_a_host_that_is_away_is_named_at_the_start(here):
    (here / "calls.127.0.0.2.away").touch()
    code, said = supervised(job(here))
    assert code == 255
    assert "error: not reached: 127.0.0.2: ssh: connect to host" in said
    assert "bash scripts/hosts/check.sh" in said
    assert not list(here.glob("started_*"))
    assert not list(Path("/tmp").glob(f"mixgrpo-test{os.getpid()}-*"))


def test_a_host_that_is_away_is_waited_for_before_a_restart(here):
    away = here / "calls.127.0.0.2.away"
    said: list[str] = []

    def is_worth_restarting() -> bool:
        away.touch()
        return True

    def hear(line: str) -> None:
        said.append(line)
        if line == "waiting up to 60 s for 127.0.0.2":
            away.unlink()

    whole = job(here, "1:0:fail", is_worth_restarting=is_worth_restarting, wait=60)
    assert Supervisor(whole, hear).run() == 0
    assert "waiting up to 60 s for 127.0.0.2" in said


def test_the_reason_is_the_first_error_that_is_no_echo():
    seen = Attempt(
        exit_codes={"a": 1, "b": 76, "c": 1},
        errors=[
            ("a", "error (rank 0): lost another process of this run: closed"),
            ("c", "RuntimeError: boom"),
            ("c", "error: later"),
        ],
    )
    assert seen.reason() == "c failed (exit code 1): RuntimeError: boom"
    assert seen.exit_code == 1
    assert not seen.has_lost_a_host
    silent = Attempt(exit_codes={"a": 0, "b": 137})
    assert silent.reason() == "b failed (exit code 137): it printed no error"
    assert Attempt(exit_codes={"a": 75, "b": 255}).has_lost_a_host


# ---- the command


def test_a_run_that_fails_before_its_next_checkpoint_is_not_started_again(tmp_path):
    has_progressed = _progress(tmp_path / "latest")
    assert not has_progressed()
    (tmp_path / "latest").write_text("iteration_1")
    assert has_progressed()
    assert not has_progressed()
    (tmp_path / "latest").write_text("iteration_1_2")  # where it failed, it saved the same again
    assert not has_progressed()
    (tmp_path / "latest").write_text("iteration_2")
    assert has_progressed()


def test_a_restart_goes_on_from_what_was_saved_since(tmp_path):
    """And not back again, to where the run was once told to go back."""
    config = parse_command(["train", "--recipe", "shapes_mixgrpo", "--run.folder", str(tmp_path)])
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.parent.mkdir()
    pointer.write_text("iteration_00000075\n")
    words = ["train", "--run.resume_from", "iteration_00000050"]
    _, again = _restarts(words, config)
    assert again() == [*words, "--run.resume", "true"], "it went back, and saved nothing yet"
    pointer.write_text("iteration_00000060\n")
    assert again() == [*words, "--run.resume", "true", "--run.resume_from", "latest"]


def test_a_folder_that_holds_a_run_is_not_resumed_by_a_restart(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").touch()
    words = ["train", "--recipe", "shapes_mixgrpo", "--run.folder", str(tmp_path)]
    assert main(["hosts", "--hostfile", str(hostfile(tmp_path, "a\nb\n")), *words]) == 1
    assert "already contains a run; continue it with --run.resume true" in capsys.readouterr().err


def test_times_that_cannot_be(tmp_path, capsys):
    file = str(hostfile(tmp_path, "a\nb\n"))
    words = ["train", "--recipe", "shapes_mixgrpo", "--lost-after", "2"]
    assert main(["hosts", "--hostfile", file, *words]) == 1
    assert "--lost-after is 2; it must be at least 3" in capsys.readouterr().err


def test_a_command_for_this_machine_is_launched_here(tmp_path, monkeypatch):
    launched: list[list[str]] = []
    monkeypatch.setattr("mixgrpo.commands.launch.run", lambda words: launched.append(words) or 5)
    file = str(hostfile(tmp_path, "localhost slots=3\n"))
    words = ["train", "--recipe", "shapes_mixgrpo", "--run.folder", "a b"]
    assert main(["hosts", *words, "--hostfile", file, "--max-restarts=0"]) == 5
    assert launched == [["--nproc_per_node", "3", *words]]
    assert main(["hosts", *words, "--hostfile", file]) == 5
    assert len(launched) == 2, "without a new checkpoint a restart does not help"


@pytest.mark.parametrize(
    ("gpus", "chosen", "expected"), [(0, "", "1"), (8, "", "8"), (8, "3", "3"), (8, "two", None)]
)
def test_a_process_on_each_gpu_or_one_on_the_cpu(
    tmp_path, monkeypatch, capsys, gpus, chosen, expected
):
    launched: list[list[str]] = []
    monkeypatch.setattr("mixgrpo.commands.launch.run", lambda words: launched.append(words) or 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setenv("PROCESSES", chosen)
    words = ["train", "--recipe", "shapes_mixgrpo", "--run.folder", str(tmp_path / "run")]
    code = main(["hosts", *words, "--hostfile", str(hostfile(tmp_path, "localhost\n"))])
    if expected is None:
        assert code == 1
        assert "PROCESSES is 'two'" in capsys.readouterr().err
    else:
        assert launched == [["--nproc_per_node", expected, *words]]


def test_on_this_machine_too_a_run_is_started_again(tmp_path, monkeypatch, capsys):
    launched: list[list[str]] = []
    saved = tmp_path / "run" / "checkpoints" / "latest"

    def launch(words: list[str]) -> int:
        launched.append(words)
        if len(launched) > 1:
            return 0
        saved.parent.mkdir(parents=True)
        saved.write_text("iteration_00000010\n")
        return 1

    monkeypatch.setattr("mixgrpo.commands.launch.run", launch)
    file = str(hostfile(tmp_path, "localhost slots=2\n"))
    words = ["train", "--recipe", "shapes_mixgrpo", "--run.folder", str(tmp_path / "run")]
    assert main(["hosts", *words, "--hostfile", file]) == 0
    more = ["--run.resume", "true", "--run.resume_from", "latest"]
    assert launched == [["--nproc_per_node", "2", *words, *part] for part in ([], more)]
    assert "restart 1 of 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--run.sed", "1"], "there is no knob run.sed; did you mean run.seed?"),
        (["trian"], "'trian' does not run in several processes"),
        ([], "no command to run on the hosts is given"),
        (["train", "--recipe", "shapes_mixgrpo"], "there is no pdsh on this machine"),
    ],
)
def test_what_is_wrong_is_told_before_a_host_is_reached(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.setenv("PATH", str(tmp_path))
    file = str(hostfile(tmp_path, "a\nb\n"))
    assert main(["hosts", "--hostfile", file, *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


# ---- SLURM

SLURM = {"MIXGRPO_HOSTS": "n1,n2", "SLURM_JOB_ID": "812", "SLURM_STEP_ID": "1"} | {
    "SLURM_NODEID": "1", "SLURM_NNODES": "2", "NCCL_DEBUG": "INFO", "WANDB_API_KEY": CANARY,
}  # fmt: skip


def test_slurm_says_which_part_is_a_hosts():
    node = slurm.node_of(SLURM, WORDS)
    assert (node.host, node.rank, node.slots, node.words) == ("n2", 1, None, WORDS)
    assert node.environment == {}  # SLURM's own has NCCL_DEBUG already
    other = slurm.node_of({**SLURM, "SLURM_STEP_ID": "2", "PROCESSES": "4"}, WORDS)
    assert (other.attempt, other.slots) == (2, 4)
    assert other.port == node.port + 2


def test_without_slurm_it_says_how_it_is_submitted():
    with pytest.raises(ValueError, match=r"SLURM_NODEID not set; submit .* with sbatch"):
        slurm.node_of({k: v for k, v in SLURM.items() if k != "SLURM_NODEID"}, [])
    with pytest.raises(ValueError, match="names 2 hosts, but SLURM has 3"):
        slurm.node_of({**SLURM, "SLURM_NNODES": "3"}, [])


@pytest.fixture
def submitted(tmp_path):
    """A place where a stub of srun writes down its words and fails as often as it is told."""
    programs = tmp_path / "programs"
    stubs = {
        "srun": 'printf "%s\\n" "$MIXGRPO_HOSTS" "$@" >>calls\n'
        "count=$(grep -c ^n1,n2 calls)\n"
        '[ -n "${STUCK:-}" ] || echo "$count" >run/checkpoints/latest\n'
        'echo "error: bad luck $count" >>logs/mixgrpo-812-n2.log\n'
        '[ "$count" -gt "$FAILURES" ] || exit "$CODE"',
        "scontrol": '[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"',
    }
    programs.mkdir()
    for name, text in stubs.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "env_setup.sh").write_text("")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/usr/bin/env bash\necho run\n")
    python.chmod(0o755)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)

    def submit(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        script = ROOT / "scripts" / "finetune" / "finetune_flux_mixgrpo.slurm"
        environment = {
            **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CODE": "7",
            "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NAME": "mixgrpo", "SLURM_JOB_ID": "812", **more,
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(script), *words],
            cwd="/", env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return submit


def test_the_slurm_script_starts_a_part_on_every_node(submitted, tmp_path):
    done = submitted("--run.folder", "a b", FAILURES="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    hosts, *words = (tmp_path / "calls").read_text().splitlines()
    assert hosts == "n1,n2"
    program = words.index("mixgrpo.hosts.slurm")
    expected = ["train", "--recipe", "flux_mixgrpo", "--run.folder", "a b", "--run.resume", "true"]
    assert words[program + 1 :] == expected
    assert "--ntasks-per-node=1" in words[:program]


def test_the_slurm_script_restarts_but_not_what_was_stopped(submitted, tmp_path):
    done = submitted("--recipe", "mine", FAILURES="2")
    assert done.returncode == 0
    assert done.stdout.count("exit code 7; restart") == 2
    assert done.stdout.splitlines()[2] == "logs/mixgrpo-812-n2.log:error: bad luck 2"
    assert "flux_mixgrpo" not in (tmp_path / "calls").read_text()
    assert submitted(FAILURES="9", MAX_RESTARTS="1").returncode == 7
    (tmp_path / "calls").unlink()
    assert submitted(FAILURES="9", CODE="143").returncode == 143
    assert (tmp_path / "calls").read_text().count("n1,n2") == 1


def test_the_slurm_script_restarts_only_where_that_may_help(submitted, tmp_path):
    """Not without a new checkpoint, unless a host was lost; never back to where a run went back."""
    assert submitted(FAILURES="9", STUCK="1").returncode == 7
    assert (tmp_path / "calls").read_text().count("n1,n2") == 1
    assert submitted(FAILURES="9", STUCK="1", CODE="75", MAX_RESTARTS="2").returncode == 75
    assert (tmp_path / "calls").read_text().count("n1,n2") == 4
    done = submitted("--run.resume_from", "iteration_00000050", FAILURES="0")
    assert done.returncode == 2
    assert "leave it out" in done.stderr
    assert (tmp_path / "calls").read_text().count("n1,n2") == 4


def test_the_slurm_script_is_bash():
    for script in (ROOT / "scripts").rglob("*.slurm"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert "set -euo pipefail" in script.read_text()
