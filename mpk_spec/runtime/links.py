"""Messages between the ranks' processes, which all run on one machine, and the news of a process that ended.

Every rank but 0 has one connection, to rank 0. They find one another through torch.distributed's store, whether
`mpk-spec` or `torchrun` started them. A connection that closes says at once that a process ended, however it did.
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import TYPE_CHECKING, Any

from mpk_spec.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

KEY = "mpk-spec/links"  # of the store: where rank 0 listens
HOST = "127.0.0.1"
START_S = 120.0  # for the other ranks' interpreters to come up


@dataclass(frozen=True)
class Place:
    """A rank's place among the others, as torchrun says it in the environment (and we do too)."""

    rank: int
    ranks: int
    host: str
    port: int

    @staticmethod
    def from_environment() -> Place | None:
        """None for a process of its own. UserError for ranks on several machines."""
        names = os.environ
        if int(names.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in names:
            return None
        if names.get("LOCAL_WORLD_SIZE", names["WORLD_SIZE"]) != names["WORLD_SIZE"]:
            raise UserError("the ranks are on several machines", "start all of them on one: torchrun --nnodes 1")
        return Place(int(names["RANK"]), int(names["WORLD_SIZE"]), names["MASTER_ADDR"], int(names["MASTER_PORT"]))

    def store(self) -> TCPStore:
        """torch.distributed's store. torchrun keeps it in a process of its own, else rank 0 does."""
        from datetime import timedelta

        from torch.distributed import TCPStore

        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return TCPStore(
            self.host, self.port, self.ranks, self.rank == 0 and not kept, timedelta(minutes=30), wait_for_workers=False
        )


def send(link: Connection, message: Any) -> None:
    link.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(link: Connection) -> Any:
    """Raises EOFError or OSError where the other process ended."""
    return pickle.loads(link.recv_bytes())


def accept(store: TCPStore, ranks: int, check: Callable[[], None]) -> list[Connection]:
    """Rank 0's links to ranks 1, 2, ...; `check` is called while it waits and may raise."""
    key, found = secrets.token_bytes(16), {}
    with socket.create_server((HOST, 0)) as server:
        server.settimeout(0.2)
        store.set(KEY, json.dumps({"port": server.getsockname()[1], "key": key.hex()}))
        deadline = time.monotonic() + START_S
        while len(found) < ranks - 1:
            check()
            if time.monotonic() > deadline:
                missing = min(set(range(1, ranks)) - found.keys())
                raise UserError(f"rank {missing} did not start within {START_S:.0f} s")
            try:
                taken, _ = server.accept()
            except TimeoutError:
                continue
            taken.setblocking(True)
            link = Connection(taken.detach())
            deliver_challenge(link, key)
            answer_challenge(link, key)
            found[receive(link)] = link
    return [found[rank] for rank in range(1, ranks)]


def dismiss(store: TCPStore) -> None:
    """Lets the other ranks go, where rank 0 had nothing for them to do."""
    store.set(KEY, json.dumps(None))


def connect(store: TCPStore, rank: int) -> Connection | None:
    """Another rank's link to rank 0. None where that one has let it go."""
    at = json.loads(store.get(KEY))
    if at is None:
        return None
    link = Connection(socket.create_connection((HOST, at["port"])).detach())
    answer_challenge(link, bytes.fromhex(at["key"]))
    deliver_challenge(link, bytes.fromhex(at["key"]))
    send(link, rank)
    return link


def cut(link: Connection) -> None:
    """Ends a link for both sides, also while another thread reads from it."""
    try:
        with socket.socket(fileno=os.dup(link.fileno())) as other:
            other.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has ended already


def watch(links: dict[int, Connection], lost: Callable[[int], None]) -> threading.Event:
    """Calls `lost(rank)` once, in a thread, as soon as one of the links ends. Setting the event ends the watch."""
    over, poll = threading.Event(), select.poll()
    ranks = {link.fileno(): rank for rank, link in links.items()}
    for number in ranks:
        poll.register(number, select.POLLRDHUP)  # and, always, errors and hang-ups: not what waits to be read

    def look() -> None:
        while not over.is_set():
            for number, _ in poll.poll(200):
                if not over.is_set():
                    lost(ranks[number])
                return

    threading.Thread(target=look, name="mpk-spec links", daemon=True).start()
    return over
