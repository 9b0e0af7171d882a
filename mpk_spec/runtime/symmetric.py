"""What a rank's peers write into: one symmetric allocation with event counters, control block and inboxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpk_spec.emit.layout import ALIGN

if TYPE_CHECKING:
    import torch

    from mpk_spec.runtime.nvshmem import Nvshmem


class Symmetric:
    """Views of this rank's part, uint8 on `device`, and how far off each rank's part is (0 where it is not mapped).

    The same sizes on every rank, so that a thing lies at the same distance from the start everywhere.
    """

    def __init__(self, library: Nvshmem, rank: int, ranks: int, sizes: dict[str, int], device: torch.device):
        self.library, self.rank, self._views = library, rank, {}
        starts, total = {}, 0
        for name, size in sizes.items():
            starts[name] = total
            total += -(-size // ALIGN) * ALIGN
        self.address: int | None = library.malloc(total)
        seen = [library.peer(self.address, peer) for peer in range(ranks)]
        self.distances, self.unmapped = self.distances_of(seen, self.address)
        for name, size in sizes.items():
            self._views[name] = view_of(self.address + starts[name], size, device)

    @staticmethod
    def distances_of(seen: list[int | None], here: int) -> tuple[list[int], tuple[int, ...]]:
        """(how far off, which ranks are not mapped), from where this rank sees each rank's part."""
        return [0 if at is None else at - here for at in seen], tuple(n for n, at in enumerate(seen) if at is None)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._views[name]

    def leave(self) -> None:
        self._views.clear()
        address, self.address = self.address, None
        self.library.leave(address)


class _Raw:
    """Memory of a GPU that torch did not allocate, described as torch reads it."""

    def __init__(self, address: int, size: int):
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 2,
        }  # fmt: skip


def view_of(address: int, size: int, device: torch.device) -> torch.Tensor:
    """uint8 `[size]` over `size` bytes at `address` of the GPU's memory, which must outlive it."""
    import torch

    view = torch.as_tensor(_Raw(address, size), device=device)
    if view.data_ptr() != address:
        raise RuntimeError(f"torch copied the memory at {address:#x} instead of looking at it")
    return view
