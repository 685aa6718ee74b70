"""Processes find each other, or say whom they wait for and end when they are asked to."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread

import pytest
from forks import SOON, exit_code, forked, said, until
from trainings import free_port

from mixgrpo.commands import launch, main
from mixgrpo.commands.command_line import carry_out
from mixgrpo.engines import rendezvous
from mixgrpo.engines.distributed import process_group
from mixgrpo.engines.rendezvous import ALONE, Place, _Joining, connect, read_place

TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}


def test_without_variables_a_process_is_alone():
    assert read_place({"LOCAL_RANK": "1"}).is_alone


def test_a_place_among_others():
    place = read_place({**TWO, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert (place.rank, place.world_size, place.address, place.port) == (1, 2, "first", 29500)
    assert not place.keeps_store
    assert read_place({**TWO, "RANK": "0"}).keeps_store
    assert not read_place({**TWO, "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}).keeps_store
    assert read_place({"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1  # needs no address


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": ""}, "RANK is ''"),
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "1.0"}, "RANK is '1.0'"),
        ({"RANK": "²"}, "RANK is '²'"),
        ({"RANK": "1_0"}, "RANK is '1_0'"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"RANK": None}, "WORLD_SIZE is set in the environment, but RANK is not"),
        ({"WORLD_SIZE": None}, "RANK is set in the environment, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR, the host of rank 0, is not set"),
        ({"MASTER_ADDR": " "}, "MASTER_ADDR, the host of rank 0, is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is ''"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
        ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is ''"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK is 'one'"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 2 and LOCAL_WORLD_SIZE is 2"),
    ],
)
def test_variables_that_make_no_sense_are_refused_with_the_remedy(given, message):
    variables = {key: value for key, value in {**TWO, **given}.items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        read_place(variables)
    assert str(refused.value).endswith(ALONE)
    assert len(str(refused.value).splitlines()) == 1


def place_of(rank: int, port: int, world_size: int = 2) -> Place:
    return Place(False, rank, world_size, address="127.0.0.1", port=port)


@contextmanager
def waiting(place: Place, patience: float = SOON) -> Iterator[_Joining]:
    """A process that waits for others to come, as a thread."""
    joining = _Joining(place, "gloo", timedelta(seconds=patience))
    joining._entry = 0
    thread = Thread(target=lambda: _meet(joining), daemon=True)
    thread.start()
    yield joining
    thread.join(SOON)
    assert not thread.is_alive()


def _meet(joining: _Joining) -> None:
    try:
        joining.store = joining._meet()  # kept: the store ends with its last reference
    except Exception as error:
        joining.error = error


def test_the_lowest_rank_that_has_come_says_who_is_missing():
    port = free_port()
    with waiting(place_of(2, port, 4)) as third:
        until(lambda: "Connection refused" in third.waiting_for)
        assert f"rank 0 at 127.0.0.1:{port}" in third.waiting_for
        with waiting(place_of(0, port, 4)) as first:
            until(lambda: "ranks 1, 3 of 4 to come" in first.waiting_for)
            assert first.waiting_for.endswith(ALONE)
            until(lambda: third.waiting_for == "")
            with waiting(place_of(1, port, 4)), waiting(place_of(3, port, 4)):
                pass
    assert (first.error, third.error) == (None, None)
    assert connect(place_of(1, port), timedelta(seconds=5)).check(["0/came/3"])


def test_ranks_and_sizes_that_do_not_fit_together_are_refused():
    port = free_port()
    with waiting(place_of(0, port, 3)) as first:
        until(lambda: "to come" in first.waiting_for)
        with waiting(place_of(1, port, 2)) as other_size:
            pass
        with waiting(place_of(1, port, 3)) as twice:
            pass
        with waiting(place_of(2, port, 3)):
            pass
    assert first.error is None
    assert "WORLD_SIZE is 2 in this process, but 3 in another" in str(other_size.error)
    assert "another process has come" in str(twice.error)


def test_a_port_that_is_taken_is_told_in_a_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with waiting(place_of(0, port)) as first:
            pass
    assert f"port {port} (MASTER_PORT) of this host is in use" in str(first.error)
    assert isinstance(first.error, ValueError)


def test_patience_ends():
    with waiting(place_of(1, free_port()), patience=0.2) as second:
        pass
    assert isinstance(second.error, TimeoutError)
    assert "waiting for rank 0 at" in str(second.error)


# ---- whole processes, forked so that none has to import torch


def join() -> int:
    rendezvous.FIRST_WORD = 0.2

    def action() -> None:
        with process_group(1):
            pass

    return carry_out(action, (ValueError, OSError), "nothing is lost")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(
    ("rank", "address", "word"),
    [
        ("0", "nosuch.invalid", "still waiting for rank 1 of 2 to come"),
        ("1", "127.0.0.1", "still waiting for rank 0 at"),
        ("1", "nosuch.invalid", "still waiting for rank 0 at nosuch.invalid"),
    ],
)
def test_left_over_variables_are_told_of_and_a_signal_ends_the_wait(
    tmp_path, rank, address, word, number
):
    told = tmp_path / "told"
    place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": address}
    with forked(told, join, **place, MASTER_PORT=str(free_port())) as pid:
        until(lambda: word in said(told))
        os.kill(pid, number)
        assert exit_code(pid) == 128 + number
    assert "unset RANK WORLD_SIZE" in said(told)
    assert f"stopped by {number.name}; nothing is lost" in said(told)
    assert "Traceback" not in said(told)


def test_a_program_that_is_no_store_is_told_of(tmp_path):
    told = tmp_path / "told"
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = {**TWO, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        with forked(told, join, **place) as pid:
            until(lambda: "if another program listens there" in said(told))
            os.kill(pid, signal.SIGTERM)
            assert exit_code(pid) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_launch_says_that_it_waits_for_other_hosts_and_heeds_signals(tmp_path, rank, number):
    told, port = tmp_path / "told", str(free_port())

    def act() -> int:
        launch.FIRST_WORD = 0.2
        several = ["--nnodes", "2", "--node_rank", rank, "--master_port", port]
        return main(["launch", *several, "train", "--recipe", "shapes_mixgrpo"])

    with forked(told, act) as pid:
        until(lambda: f"hosts, which meet at 127.0.0.1:{port}" in said(told))
        os.kill(pid, number)
        assert exit_code(pid) == 128 + number
    assert f"stopped by {number.name} before the command started" in said(told)
