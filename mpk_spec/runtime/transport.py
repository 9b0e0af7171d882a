"""How ranks reach one another's memory: through peer pointers, or NVSHMEM's device API where those do not reach.

`peer`: the peers' memory is mapped, and the kernel stores and signals there itself. `nvshmem`: the kernel is built with
`MPK_NVSHMEM` and puts everything with NVSHMEM's device API, which takes a network card where nothing shorter leads to
the peer. `auto` is `peer` wherever it works.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from mpk_spec.errors import UserError, did_you_mean

TRANSPORTS = ("auto", "peer", "nvshmem")
VARIABLE = "MPK_SPEC_TRANSPORT"
DEFINES = {"peer": (), "nvshmem": ("MPK_NVSHMEM",)}
IBGDA = "NVSHMEM_IB_ENABLE_IBGDA"  # NVRTC cannot compile its device code
_ON = ("1", "t", "true", "y", "yes", "on")


@dataclass(frozen=True)
class Reach:
    """What keeps `rank` from its peers' memory: those that are not mapped, those without atomic operations."""

    rank: int
    unmapped: tuple[int, ...] = ()
    without_atomics: tuple[int, ...] = ()

    def obstacle(self) -> str | None:
        """Why peer pointers do not do, in words."""
        if self.unmapped:
            return f"peer {self.unmapped[0]} is not directly addressable from GPU {self.rank}"
        if self.without_atomics:
            return f"GPU {self.rank} has no atomic operations in the memory of peer {self.without_atomics[0]}"
        return None


def wanted_transport() -> str:
    """One of `TRANSPORTS`, from the environment."""
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in TRANSPORTS:
        raise UserError(f"{VARIABLE}: there is no transport '{wanted}'", did_you_mean(wanted, TRANSPORTS, "transports"))
    return wanted


def choose(wanted: str, found: list[Reach]) -> tuple[str, str | None]:
    """("peer" or "nvshmem" for all ranks, what speaks against peer pointers), from what each rank says.

    Raises UserError where the GPUs cannot have what was asked for, or, with `auto`, none that is sure to work.
    """
    obstacles = [text for reach in found if (text := reach.obstacle())]
    why = obstacles[0] if obstacles else None
    if wanted == "nvshmem" or why is None:
        return ("nvshmem" if wanted == "nvshmem" else "peer"), why
    if wanted == "peer":
        raise UserError(
            f"{why}: peer pointers need NVLink or peer access with atomic operations",
            f"{VARIABLE}=auto takes NVSHMEM's device API; `nvidia-smi topo -p2p n` shows which GPUs reach one another",
        )
    if any(reach.without_atomics and not reach.unmapped for reach in found):
        raise UserError(  # NVSHMEM would add its signals up with the same operations
            f"{why}: signals are additions in a peer's memory",
            f"{VARIABLE}=nvshmem tries it nevertheless; `nvidia-smi topo -m` shows how the GPUs are connected",
        )
    return "nvshmem", why


def check_device_api() -> None:
    """Raises UserError where NVSHMEM is set up in a way that the kernel's part of it does not know."""
    if os.environ.get(IBGDA, "").lower() in _ON:
        raise UserError(
            f"the kernel reaches its peers through NVSHMEM, and {IBGDA} asks for a transport that it lacks",
            f"unset {IBGDA}: a thread of the host then drives the network card",
        )
