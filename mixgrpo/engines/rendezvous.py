"""How the processes of a run find each other: torchrun's variables, and the wait for all."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic, sleep

import torch.distributed as dist

FIRST_WORD = 10.0  # seconds of waiting until it is reported; each next report takes thrice as long
LAUNCHED = 60.0  # the same under torchrun, which ends the run itself if a process fails
ALONE = (
    "to run a single process, `unset RANK WORLD_SIZE`; to run several, start them with "
    "`python -m mixgrpo launch`"
)
_OWN = "127.0.0.1"  # rank 0 reaches its own store even if MASTER_ADDR has no address yet
_entries = itertools.count()  # a process may join several groups, one after the other


@dataclass(frozen=True)
class Place:
    """This process's place among those of a run, as its environment describes it.

    Attributes:
        is_alone: whether neither RANK nor WORLD_SIZE is set.
        address: where rank 0 or torchrun keeps the store by which the processes meet.
        is_served: whether torchrun keeps that store.
        attempt: number of times that torchrun has restarted the processes.
    """

    is_alone: bool = True
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    port: int = 0
    is_served: bool = False
    attempt: str = "0"

    @property
    def keeps_store(self) -> bool:
        return self.rank == 0 and not self.is_served


def read_place(environment: Mapping[str, str]) -> Place:
    """Reads this process's place from the variables that torchrun sets.

    Raises:
        ValueError: they contradict each other, or one is missing or not a number.
    """
    local_rank = _number(environment, "LOCAL_RANK", 0)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", 1, least=1)
    if "LOCAL_WORLD_SIZE" in environment and local_rank >= local_size:
        raise ValueError(
            f"LOCAL_RANK is {local_rank} and LOCAL_WORLD_SIZE is {local_size}; LOCAL_RANK counts "
            f"from 0, so it must be less than LOCAL_WORLD_SIZE; {ALONE}"
        )
    is_set = [name in environment for name in ("RANK", "WORLD_SIZE")]
    if not any(is_set):
        return Place(local_rank=local_rank, local_size=local_size)
    if not all(is_set):
        there, missing = ("RANK", "WORLD_SIZE") if is_set[0] else ("WORLD_SIZE", "RANK")
        raise ValueError(f"{there} is set in the environment, but {missing} is not; {ALONE}")
    rank = _number(environment, "RANK", 0)
    world_size = _number(environment, "WORLD_SIZE", 1, least=1)
    if rank >= world_size:
        raise ValueError(
            f"RANK is {rank} and WORLD_SIZE is {world_size}; RANK counts from 0, so it must be "
            f"less than WORLD_SIZE; {ALONE}"
        )
    address, port = environment.get("MASTER_ADDR", ""), 0
    if world_size > 1:
        if not address.strip():
            raise ValueError(
                f"WORLD_SIZE is {world_size}, but MASTER_ADDR, the host of rank 0, is not set; "
                f"{ALONE}"
            )
        port = _port(environment)
    return Place(
        is_alone=False,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_size,
        address=address.strip(),
        port=port,
        is_served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _number(environment: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    text = environment.get(name, str(default))
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise ValueError(
            f"{name} is {text!r} in the environment; it must be a whole number, at least "
            f"{least}; {ALONE}"
        )
    return int(text)


def _port(environment: Mapping[str, str]) -> int:
    text = environment.get("MASTER_PORT", "")
    if text.isascii() and text.isdecimal() and 0 < int(text) < 1 << 16:
        return int(text)
    is_what = f"is {text!r}" if "MASTER_PORT" in environment else "is not set"
    raise ValueError(
        f"MASTER_PORT {is_what} in the environment; it must be a port on the host of rank 0, from "
        f"1 to 65535; {ALONE}"
    )


def connect(place: Place, timeout: timedelta) -> dist.Store:
    """Another connection to the store by which the processes have met.

    Keys do not mix with those of earlier attempts of torchrun.

    Raises:
        RuntimeError: the store does not answer within ``timeout``.
    """
    address = _OWN if place.keeps_store else place.address
    store = dist.TCPStore(
        address, place.port, is_master=False, wait_for_workers=False, timeout=timeout
    )
    return dist.PrefixStore(f"mixgrpo/{place.attempt}", store)


def join_group(place: Place, backend: str, patience: timedelta) -> None:
    """Waits for all processes, and initializes the default process group with them.

    The wait takes place in another thread, because torch waits without heeding signals. Meanwhile
    this thread reports on standard error whom it waits for.

    Raises:
        ValueError: another process has the same rank or another WORLD_SIZE, or MASTER_PORT is in
            use.
        TimeoutError: not all processes have come within ``patience``.
        ConnectionError: the process that keeps the store has ended.
    """
    joining = _Joining(place, backend, patience)
    thread = threading.Thread(target=joining.run, name="rendezvous", daemon=True)
    thread.start()
    began, next_word = monotonic(), LAUNCHED if place.is_served else FIRST_WORD
    while thread.is_alive():
        thread.join(0.1)
        waited = monotonic() - began
        if waited > next_word and joining.waiting_for:
            sys.stderr.write(f"after {waited:.0f} s, still waiting for {joining.waiting_for}\n")
            sys.stderr.flush()
            next_word *= 3
    if joining.error is not None:
        raise joining.error


class _Joining:
    """Joins a process group.

    Attributes:
        waiting_for: what this process waits for; empty if another process reports it.
        error: why it could not join.
    """

    def __init__(self, place: Place, backend: str, patience: timedelta) -> None:
        self.waiting_for = "its turn"
        self.error: BaseException | None = None
        self._place = place
        self._backend = backend
        self._patience = patience
        self._deadline = monotonic() + patience.total_seconds()
        self._entry = next(_entries)

    def run(self) -> None:
        try:
            store = self._meet() if self._place.world_size > 1 else dist.HashStore()
            self.waiting_for = (
                f"the connections between all {self._place.world_size} processes, which have come; "
                "open the ports between the hosts, and set GLOO_SOCKET_IFNAME to their network "
                "interface"
            )
            dist.init_process_group(
                self._backend,
                store=store,
                rank=self._place.rank,
                world_size=self._place.world_size,
                timeout=self._patience,
            )
        except BaseException as error:
            self.error = error

    def _meet(self) -> dist.Store:
        """The store, once all processes have come to it."""
        place = self._place
        store = self._serve() if place.keeps_store else self._reach()
        store = dist.PrefixStore(f"mixgrpo/{place.attempt}/{self._entry}", store)
        try:
            self._come(store)
        except dist.DistError as error:
            raise ConnectionError(
                f"lost the process that keeps the store at {self._where} while waiting for "
                f"{self.waiting_for or 'the others'}; its own output says why"
            ) from error
        return store

    @property
    def _where(self) -> str:
        return f"{self._place.address}:{self._place.port} (MASTER_ADDR, MASTER_PORT)"

    def _serve(self) -> dist.Store:
        try:
            return dist.TCPStore(
                _OWN,
                self._place.port,
                is_master=True,
                wait_for_workers=False,
                timeout=self._patience,
                multi_tenant=True,
            )
        except dist.DistNetworkError as error:
            in_use = os.strerror(errno.EADDRINUSE).lower() in str(error)
            why = "is in use by another program" if in_use else "cannot be opened for listening"
            raise ValueError(
                f"port {self._place.port} (MASTER_PORT) of this host {why}; set MASTER_PORT to "
                f"another port in all processes; {ALONE}"
            ) from error

    def _reach(self) -> dist.Store:
        """Connects to the store, which may come to be later than this process."""
        place = self._place
        hint = f"; {ALONE}"
        while True:
            try:
                socket.create_connection((place.address, place.port), timeout=5).close()
                break
            except OSError as error:
                self.waiting_for = (
                    f"rank 0 at {self._where}, as rank {place.rank} of {place.world_size}: "
                    f"{error.strerror or error}{hint}"
                )
            self._rest(0.5)
        self.waiting_for = (
            f"an answer of rank 0 at {self._where}; if another program listens there, set "
            f"MASTER_PORT to another port in all processes{hint}"
        )
        return dist.TCPStore(
            place.address,
            place.port,
            is_master=False,
            wait_for_workers=False,
            timeout=self._patience,
        )

    def _come(self, store: dist.Store) -> None:
        """Signs in, and waits until all others have."""
        place, began = self._place, monotonic()
        # torchrun numbers its processes itself, and may start some anew with the same store.
        if store.add(f"came/{place.rank}", 1) > 1 and not place.is_served:
            raise ValueError(
                f"another process has come to {self._where} with RANK={place.rank}; give every "
                f"process a RANK of its own; {ALONE}"
            )
        size = store.compare_set("size", "", str(place.world_size)).decode()
        if size != str(place.world_size):
            raise ValueError(
                f"WORLD_SIZE is {place.world_size} in this process, but {size} in another that has "
                f"come to {self._where}; set it to the same number in all processes; {ALONE}"
            )
        missing = list(range(place.world_size))
        while missing := [rank for rank in missing if not store.check([f"came/{rank}"])]:
            first = next(rank for rank in range(place.world_size) if rank not in missing)
            self.waiting_for = self._absent(missing) if first == place.rank else ""
            self._rest(min(5.0, max(0.02, (monotonic() - began) / 20)))

    def _absent(self, missing: list[int]) -> str:
        some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        ranks = f"rank {some}" if len(missing) == 1 else f"ranks {some}"
        place = self._place
        if place.is_served:
            return f"{ranks} of {place.world_size} to start"
        return (
            f"{ranks} of {place.world_size} to come to {self._where}, since RANK={place.rank} and "
            f"WORLD_SIZE={place.world_size} are set in the environment; {ALONE}"
        )

    def _rest(self, seconds: float) -> None:
        if monotonic() > self._deadline:
            raise TimeoutError(
                f"gave up after {self._patience.total_seconds() / 3600:g} h of waiting for "
                f"{self.waiting_for or 'the other processes'}"
            )
        sleep(seconds)
