"""The ranks of a run over torch.distributed: the collective operations that `Team` promises.

No call blocks: each is started, and this thread looks at it until it is done (`channel.until_done`), so that
Ctrl-C is heard and a rank that is gone ends the waiting (`watch.py`). Tensors travel from the device of the
backend: that of the work, or the CPU where the backend (gloo) knows nothing else.
"""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import pairwise, zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from gptq_cli.events import Observer
from gptq_cli.ranks.channel import Channel, Kind, Traffic, until_done
from gptq_cli.ranks.leaves import leaf_count, padded_bytes
from gptq_cli.ranks.team import Nodes, Parcel
from gptq_cli.ranks.tree import Node, total
from gptq_cli.ranks.waits import Waits
from gptq_cli.ranks.watch import Watch

T = TypeVar("T")
PATIENCE = timedelta(days=365)
"""Until torch itself ends an operation: how long one may take is for the watch to say."""


class Ranks:
    """A `Team` of several processes. `device`: where tensors travel from."""

    def __init__(self, rank: int, size: int, device: torch.device, watch: Watch) -> None:
        self.rank, self.size, self.leaves = rank, size, leaf_count(size)
        self.traffic = Traffic()
        self._device, self._watch = device, watch
        self._waits = Waits(watch)

    def at(self, where: str) -> None:
        """See `Team.at`."""
        self._watch.at(where)

    def tell(self, observer: Observer) -> None:
        """See `Team.tell`."""
        self._waits.observer = observer

    def decided(self, make: Callable[[], T]) -> T:
        """See `Team.decided`."""
        if self.rank == 0:
            value = make()
            self._broadcast(_pickled(value))
            return value
        told: T = pickle.loads(self._broadcast(b""))
        return told

    def gathered(self, value: T) -> list[T]:
        """See `Team.gathered`."""
        own = _as_tensor(_pickled(value))
        sizes = [int(size) for size in self._gather(torch.tensor([own.numel()]), "other").flatten()]
        return [pickle.loads(part.numpy().tobytes()) for part in self._exchange(own, sizes, "other")]

    def exchanged(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """See `Team.exchanged`."""
        return self._exchange(own, sizes, "code")

    def _exchange(self, own: Tensor, sizes: Sequence[int], kind: Kind) -> list[Tensor]:
        longest = padded_bytes(sizes)
        if not longest:
            return [own] * self.size
        padded = own.new_zeros(longest)
        padded[: own.numel()] = own
        received = self._gather(padded, kind).to(own.device)
        return [row[:size] for row, size in zip(received, sizes, strict=True)]

    def carry(self, piece: Tensor, source: int) -> None:
        """See `Team.carry`."""
        there = piece.to(self._device)
        self._wait(dist.broadcast(there, source, async_op=True))
        if self.rank == source:
            self.traffic.sent("factor", there.nbytes)
        elif there is not piece:
            piece.copy_(there)

    def collected(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """See `Team.collected`."""
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self._device)
        padded[: own.numel()] = own
        rows = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
        self._wait(dist.gather(padded, rows, 0, async_op=True))
        if rows is None:
            self.traffic.sent("other", padded.numel())
            return []
        return [row[:size].cpu() for row, size in zip(rows, sizes, strict=True)]

    def summed(self, nodes: Nodes, present: Sequence[Sequence[Node]], length: int) -> Tensor | None:
        """See `Team.summed`. Every rank gets its part of all nodes, adds them, and all get all parts."""
        device, own = self._device_of(nodes), [value for _, value in nodes if value is not None]
        bounds = [length * rank // self.size for rank in range(self.size + 1)]
        lengths = [b - a for a, b in pairwise(bounds)]
        sent = [value[a:b] for a, b in pairwise(bounds) for value in own]
        outgoing = torch.cat(sent).to(self._device) if sent else torch.empty(0, device=self._device)
        del sent, own
        nodes.clear()
        mine = lengths[self.rank]
        counts = [len(found) for found in present]
        incoming = torch.empty(mine * sum(counts), device=self._device)
        self._wait(
            dist.all_to_all_single(
                incoming,
                outgoing,
                [mine * count for count in counts],
                [counts[self.rank] * one for one in lengths],
                async_op=True,
            )
        )
        self.traffic.sent("sum", 4 * counts[self.rank] * (length - mine))
        del outgoing
        parts = iter(incoming.view(sum(counts), mine))
        whole = total([(node, next(parts)) for found in present for node in found], self.leaves)
        if whole is None:
            return None
        padded = torch.zeros(max(lengths), device=self._device)
        padded[:mine] = whole
        rows = self._gather(padded, "sum")
        return torch.cat([row[:one] for row, one in zip(rows, lengths, strict=True)]).to(device)

    def delivered(self, parcels: Sequence[Parcel], length: int) -> Iterator[tuple[int, Tensor]]:
        """See `Team.delivered`. One parcel of each rank at a time, and of these a piece at a time, so that
        all send and receive as much, and little lies beside what is summed."""
        queues = [[one for one in parcels if one.owner == rank] for rank in range(self.size)]
        bounds = [length * piece // self.size for piece in range(self.size + 1)]
        for several in zip_longest(*queues):
            own = several[self.rank]
            found = None if own is None else torch.empty(length, device=self._device_of(own.nodes))
            for a, b in pairwise(bounds):
                whole = self._piece(several, a, b)
                if found is not None and whole is not None:
                    found[a:b] = whole
                del whole
            for parcel in several:
                if parcel is not None:
                    parcel.nodes.clear()
            if own is not None and found is not None:
                yield own.place, found
            del found  # before the next one

    def _piece(self, several: Sequence[Parcel | None], a: int, b: int) -> Tensor | None:
        """Numbers a..b of this rank's parcel, of one of each rank."""
        sent = [[v[a:b] for _, v in one.nodes if v is not None] if one else [] for one in several]
        own = several[self.rank]
        counts = [len(found) for found in own.present] if own is not None else [0] * self.size
        flat = [value for values in sent for value in values]
        outgoing = torch.cat(flat).to(self._device) if flat else torch.empty(0, device=self._device)
        incoming = torch.empty((b - a) * sum(counts), device=self._device)
        sizes = [(b - a) * len(values) for values in sent]
        came = [(b - a) * count for count in counts]
        self._wait(dist.all_to_all_single(incoming, outgoing, came, sizes, async_op=True))
        self.traffic.sent("sum", 4 * (sum(sizes) - sizes[self.rank]))
        if own is None:
            return None
        parts = iter(incoming.view(sum(counts), b - a))
        return total([(node, next(parts)) for found in own.present for node in found], self.leaves)

    def _device_of(self, nodes: Nodes) -> torch.device:
        """Where sums are that this rank has some of; else where they travel from."""
        return next((value.device for _, value in nodes if value is not None), self._device)

    def channel(self, receivers: Sequence[int]) -> Channel | None:
        """See `Team.channel`."""
        group = dist.new_group([0, *receivers], backend="gloo")
        if self.rank and self.rank not in receivers:
            return None
        patient(group)
        return Channel(group, self._watch, self.traffic)

    def _gather(self, own: Tensor, kind: Kind) -> Tensor:  # (ranks, …), on the device of the backend
        own = own.to(self._device)
        received = own.new_empty(self.size, *own.shape)
        self._wait(dist.all_gather(list(received), own, async_op=True))
        self.traffic.sent(kind, (self.size - 1) * own.nbytes)
        return received

    def _broadcast(self, data: bytes) -> bytes:
        """The bytes of rank 0."""
        size = torch.tensor([len(data)], device=self._device)
        self._wait(dist.broadcast(size, 0, async_op=True))
        flat = _as_tensor(data) if data else torch.empty(int(size), dtype=torch.uint8)
        flat = flat.to(self._device)
        self._wait(dist.broadcast(flat, 0, async_op=True))
        self.traffic.sent("other", len(data))
        return data or flat.cpu().numpy().tobytes()

    def _wait(self, work: Any) -> None:
        """Until `work` is done. Raises the error of a rank that is gone."""
        begun = time.perf_counter()
        try:
            with self._watch.waiting():
                until_done(work, self._watch, passed=self._waits.passed)
        finally:
            waited = time.perf_counter() - begun
            self.traffic.waited_seconds += waited
            self._waits.ended(waited)


def patient(group: Any = None) -> None:
    """Have torch wait for the operations of a process group, by default that of all ranks, as long as it
    takes; how long it waited for their connection is over."""
    _set_pg_timeout(PATIENCE, group)


class _OnHost(pickle.Pickler):
    """Tensors arrive on the CPU: an accelerator's number means another one to another rank."""

    def reducer_override(self, value: Any) -> Any:
        """See `pickle.Pickler`."""
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return value.cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # type: ignore[no-untyped-call]
        return NotImplemented


def _pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    _OnHost(buffer).dump(value)
    return buffer.getvalue()


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
