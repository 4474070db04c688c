"""Bytes of the first rank on their way to some of the others, beside all other traffic.

A channel has a process group of its own, on CPUs, so that a thread may wait for the next block while the main
thread works on this one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from gptq_cli.errors import RankLost
from gptq_cli.ranks.watch import Watch
from gptq_cli.wording import duration_words, first_line

_FIRST_PAUSE, _LONGEST_PAUSE = 2e-5, 2e-3


Kind = Literal["sum", "code", "factor", "other"]
"""What travels: sums over samples, solved linears and factors of Hessians, which `planning.traffic`
foretells; and the rest, such as words, files and snapshots."""


@dataclass(slots=True)
class Traffic:
    """What a rank has sent, and how long it has waited."""

    sum_bytes: int = 0
    code_bytes: int = 0
    factor_bytes: int = 0
    other_bytes: int = 0
    waited_seconds: float = 0.0

    @property
    def sent_bytes(self) -> int:
        """All of it."""
        return self.sum_bytes + self.code_bytes + self.factor_bytes + self.other_bytes

    def sent(self, kind: Kind, size_bytes: int) -> None:
        """So many bytes left this rank."""
        name = f"{kind}_bytes"
        setattr(self, name, getattr(self, name) + size_bytes)


class Channel:
    """From rank 0 to the other ranks of `group`; all of them call the same methods in the same order."""

    def __init__(self, group: Any, watch: Watch, traffic: Traffic) -> None:
        self._group, self._watch, self._traffic = group, watch, traffic
        self._sends = dist.get_rank(group) == 0

    def carry(self, piece: Tensor) -> None:  # uint8, in main memory
        """Have what is in `piece` on rank 0 in `piece` on all."""
        if piece.numel():
            self._wait(dist.broadcast(piece, 0, group=self._group, async_op=True))
            self._traffic.sent("other", piece.numel() if self._sends else 0)

    def agreed(self, ready: bool) -> bool:
        """Whether all are `ready`."""
        found = torch.tensor([int(ready)])
        self._wait(dist.all_reduce(found, dist.ReduceOp.MIN, group=self._group, async_op=True))
        return bool(found)

    def _wait(self, work: Any) -> None:
        """The watch counts the waits of main threads alone, so here it is found that nothing comes."""
        until_done(work, self._watch, seconds=self._watch.limits.stuck_seconds)


def until_done(
    work: Any, watch: Watch, *, seconds: float | None = None, passed: Callable[[float], None] | None = None
) -> None:
    """Until an operation of `torch.distributed` is done. Raises the error of a rank that is gone, and where
    it takes longer than `seconds`. `passed` hears again and again how long it has taken.

    No call blocks, so that Ctrl-C is heard.
    """
    begun, pause = time.monotonic(), _FIRST_PAUSE
    try:
        while not work.is_completed():
            watch.check()
            if seconds is not None and time.monotonic() - begun > seconds:
                raise RankLost(
                    f"weights were on their way between the ranks for {duration_words(seconds)} and did not "
                    "arrive",
                    hint="the network, or a file system that does not answer on the machine of rank 0, may "
                    "be why",
                )
            if passed is not None:
                passed(time.monotonic() - begun)
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
        work.wait()
    except RuntimeError as error:
        raise watch.blamed() or RankLost(
            f"the connection between the ranks broke: {first_line(error)}",
            hint="the network, or a limit of the machine on connections, may be why",
        ) from error
