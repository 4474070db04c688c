"""Keeping and going on with what is finished, where several ranks work together.

Rank 0 alone has the folder: it reads the packed tensors of finished blocks and the snapshot for all, and
writes snapshots of what all ranks have. The samples of a snapshot are named, so any number of ranks can go on
with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from socket import gethostname

import torch
from torch import Tensor

from gptq_cli.engine.capture import HiddenStates
from gptq_cli.engine.keep import by_sample, restore, samples_wanted
from gptq_cli.engine.tuned import Tuned
from gptq_cli.events import DeviceMemory, Observer, RanksReported, RankState
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.ranks.team import Team, decided_elsewhere
from gptq_cli.results.run import BlockReport

Samples = Iterable[tuple[str, Tensor]]
"""Names and values."""
Stored = Mapping[str, Callable[[], Tensor]]


def collected(team: Team, samples: Samples) -> Iterator[tuple[str, Tensor]]:
    """The samples of all ranks, on the rank that leads and in its main memory; on the others nothing.

    One sample of every rank at a time, so that no device holds those of others.
    """
    if team.size == 1:
        yield from samples
        return
    own = list(samples)
    described = team.gathered([(name, value.dtype, tuple(value.shape)) for name, value in own])
    for at in range(max(map(len, described))):
        there = [names[at : at + 1] for names in described]
        sizes = [sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in one) for one in there]
        mine = own[at][1].contiguous() if at < len(own) else torch.empty(0, dtype=torch.uint8)
        parts = team.collected(mine.flatten().view(torch.uint8), sizes)
        for part, one in zip(parts, there, strict=False):
            for name, dtype, shape in one:
                yield name, part.clone().view(dtype).view(shape)


def restore_together(
    team: Team, states: HiddenStates, find: Callable[[], tuple[Stored, int] | None]
) -> tuple[int, bool]:
    """Put a snapshot in place of the hidden states of all ranks: the number of the block that they enter, 0
    without one; and whether it fitted. `find` is called on the rank that leads: the samples, and the block.
    """
    found: list[Stored] = []

    def told() -> tuple[list[str], int] | None:
        there = find()
        if there is None:
            return None
        found.append(there[0])
        return sorted(there[0]), there[1]

    snapshot = team.decided(told)
    if snapshot is None:
        return 0, True
    names, block = snapshot
    wanted = samples_wanted(states)
    if not all(team.gathered(wanted is not None and wanted <= set(names))):
        return 0, False
    if team.size == 1:
        restore(states, found[0], block)
        return block, True
    kept: dict[str, Tensor] = {}
    for name in names:
        value = team.decided(partial(_read, found, name))
        if wanted is not None and name in wanted:
            kept[name] = value
    restore(states, {name: partial(kept.__getitem__, name) for name in kept}, block)
    return block, True


def _read(found: Sequence[Stored], name: str) -> Tensor:
    return found[0][name]()


class RankReports:
    """Tells how all ranks are: their memory, and how long each has waited since the last time."""

    def __init__(self, team: Team, observer: Observer) -> None:
        self._team, self._observer = team, observer
        self._waited = team.traffic.waited_seconds
        team.tell(observer)

    def tell(self, block: str, memory: tuple[DeviceMemory, ...]) -> None:
        """Block `block` is finished ("": none is yet); `memory`: of this rank. All ranks ask at once."""
        if self._team.size == 1:
            return
        waited = self._team.traffic.waited_seconds
        own = RankState(
            rank=self._team.rank,
            host=gethostname(),
            memory=memory,
            waited_seconds=waited - self._waited,
        )
        self._waited = waited
        self._observer(RanksReported(block=block, ranks=tuple(self._team.gathered(own))))


@dataclass(frozen=True, slots=True)
class FollowingKeeper:
    """The `Keeper` of every rank but the first."""

    team: Team
    finished: tuple[BlockReport, ...]

    def packed(self, linear: LinearInfo) -> PackedTensors:
        """See `Keeper.packed`."""
        packed: PackedTensors = self.team.decided(decided_elsewhere)
        return packed

    def restore(self, states: HiddenStates) -> int:
        """See `Keeper.restore`."""
        return restore_together(self.team, states, decided_elsewhere)[0]

    def keep_gradients(self) -> None:
        """See `Keeper.keep_gradients`: several processes take none."""

    def keep(self, report: BlockReport, states: HiddenStates) -> None:
        """See `Keeper.keep`."""
        due: bool = self.team.decided(decided_elsewhere)
        if due:
            for _ in collected(self.team, by_sample(states) or ()):
                pass

    def forget_unfinished(self) -> None:
        """See `Keeper.forget_unfinished`."""

    def tuned(self) -> Tuned | None:
        """See `Keeper.tuned`. Several ranks do not tune."""
        return None

    def keep_tuned(self, tuned: Tuned) -> None:
        """See `Keeper.keep_tuned`."""
