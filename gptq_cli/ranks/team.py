"""What the engine asks of the processes that work together. Every rank calls the same methods in the same
order; what a method returns is the same on every rank unless it says otherwise.

`Alone` is one process: each operation gives back what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from gptq_cli.errors import GptqError
from gptq_cli.events import Observer
from gptq_cli.ranks.channel import Channel, Traffic
from gptq_cli.ranks.leaves import Share, micro_batches, share_of
from gptq_cli.ranks.tree import Node, total

T = TypeVar("T")
Nodes = list[tuple[Node, Tensor | None]]
"""The sums of a rank's nodes, in order."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """The sums of a moment on their way to the rank that needs them."""

    nodes: Nodes
    """Of this rank; consumed."""
    present: Sequence[Sequence[Node]]
    """Of every rank the nodes that it has."""
    owner: int
    place: int
    """What the owner knows it by."""


class Team(Protocol):
    """The ranks of a run, as one of them sees it."""

    @property
    def rank(self) -> int:
        """This one; 0 leads."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def leaves(self) -> int:
        """Leaves into which the samples are cut; 0: they are not cut, and sums run over all of them."""
        ...

    @property
    def traffic(self) -> Traffic:
        """Of this rank, until now."""
        ...

    def decided(self, make: Callable[[], T]) -> T:
        """What `make` returns on the rank that leads; only there it is called."""
        ...

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, in order."""
        ...

    def summed(self, nodes: Nodes, present: Sequence[Sequence[Node]], length: int) -> Tensor | None:
        """The sum of all ranks' nodes, flat fp32 of `length`; None where no rank has one.

        `present`: of every rank the nodes that it has. The tensors in `nodes` are consumed.
        """
        ...

    def delivered(self, parcels: Sequence[Parcel], length: int) -> Iterator[tuple[int, Tensor]]:
        """The place and the sum, flat fp32 of `length`, of each parcel of this rank; of others nothing."""
        ...

    def exchanged(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The flat uint8 tensors of all ranks, on the device of `own`; `sizes`: of every rank's in bytes."""
        ...

    def carry(self, piece: Tensor, source: int) -> None:
        """Have what is in `piece` on rank `source` in `piece` on all: a part of a factor."""
        ...

    def collected(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """As `exchanged`, on the rank that leads alone and on the CPU; on the others nothing."""
        ...

    def channel(self, receivers: Sequence[int]) -> Channel | None:
        """A way for bytes from rank 0 to these; None on a rank that is neither."""
        ...

    def tell(self, observer: Observer) -> None:
        """Have `observer` hear when this rank waits long for others."""
        ...

    def at(self, where: str) -> None:
        """Work goes on at `where`, as the other ranks are told if this one is lost."""
        ...


@dataclass(frozen=True, slots=True)
class Alone:
    """One process. `leaves`: sums are made as in a run of several ranks, so that the result is theirs."""

    leaves: int = 0
    rank: int = 0
    size: int = 1

    @property
    def traffic(self) -> Traffic:
        """See `Team.traffic`."""
        return Traffic()

    def decided(self, make: Callable[[], T]) -> T:
        """See `Team.decided`."""
        return make()

    def gathered(self, value: T) -> list[T]:
        """See `Team.gathered`."""
        return [value]

    def summed(self, nodes: Nodes, present: Sequence[Sequence[Node]], length: int) -> Tensor | None:
        """See `Team.summed`."""
        return total(nodes, self.leaves)

    def delivered(self, parcels: Sequence[Parcel], length: int) -> Iterator[tuple[int, Tensor]]:
        """See `Team.delivered`."""
        for parcel in parcels:
            whole = total(parcel.nodes, self.leaves)
            parcel.nodes.clear()
            if whole is not None and parcel.owner == self.rank:
                yield parcel.place, whole

    def exchanged(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """See `Team.exchanged`."""
        return [own]

    def carry(self, piece: Tensor, source: int) -> None:
        """See `Team.carry`."""

    def collected(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """See `Team.collected`."""
        return [own]

    def channel(self, receivers: Sequence[int]) -> None:
        """See `Team.channel`."""

    def tell(self, observer: Observer) -> None:
        """See `Team.tell`."""

    def at(self, where: str) -> None:
        """See `Team.at`."""


ALONE = Alone()
"""A run without a launcher."""


def decided_elsewhere() -> Any:
    """What a rank that follows gives to `Team.decided`: there it is not called."""
    raise GptqError("a rank that follows was asked to decide")


def share_samples(team: Team, pairs: Sequence[int], others: Sequence[int], batch_size: int) -> Share:
    """The samples that this rank works on, in micro-batches; where they are not cut, all of them."""
    if team.leaves:
        return share_of(pairs, others, batch_size, team.leaves, team.rank, team.size)
    paired = micro_batches(pairs, batch_size)
    return Share([*paired, *micro_batches(others, batch_size)], len(paired), pairs=len(pairs))
