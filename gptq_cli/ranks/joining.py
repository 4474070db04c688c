"""From a launch to a team: the ranks meet, say who they are, and are compared before anything is done.

Each leaves word of itself in the store that the launcher named. Rank 0 reads all of it and refuses ranks that
cannot work together: other commands, other versions, more processes on a machine than it has accelerators,
clocks that are apart. Then the process group is opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from gptq_cli import __version__
from gptq_cli.devices.accelerators import (
    budgets_of,
    name_on_machine,
    present_accelerators,
    torch_device,
)
from gptq_cli.errors import ConfigError, GptqError, Interrupted, RankLost
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.placement import DeviceBudget, RankPlace, least_of
from gptq_cli.ranks.group import Ranks, patient
from gptq_cli.ranks.launch import Launch
from gptq_cli.ranks.leaves import leaf_count
from gptq_cli.ranks.team import Alone, Team
from gptq_cli.ranks.watch import LIMITS, Limits, Watch, Word
from gptq_cli.wording import duration_words, first_line, number_of

MAX_CLOCK_GAP_SECONDS = 60.0
_BACKENDS = {"cuda": "nccl", "xpu": "xccl", "npu": "hccl"}
_POLL_SECONDS = 0.05
_LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What a rank says of itself before the work begins."""

    rank: int
    host: str
    pid: int
    local_rank: int
    local_size: int
    asked: tuple[str, ...]
    """The words of its command line."""
    versions: tuple[tuple[str, str], ...]
    accelerators: int
    """On its machine, that it can see."""
    device: str
    """On which it works: its own accelerator, or "cpu"."""
    card: str
    """Which accelerator of its machine that is, whatever it calls it; "" for the cpu."""
    device_bytes: tuple[int, int]
    """Total and free, of its device."""
    host_bytes: tuple[int, int]
    """The same of its machine's main memory, shared out among the ranks there."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def place(self) -> RankPlace:
        """Where it works, and what it can count on."""
        device, main = Device.parse(self.device), DeviceBudget(CPU, *self.host_bytes)
        own = (DeviceBudget(device, *self.device_bytes),) if device.is_accelerator else ()
        return RankPlace(self.rank, self.host, self.local_size, (*own, main))


@dataclass(frozen=True, slots=True)
class Joined:
    """A rank that has joined the others."""

    launch: Launch
    team: Team
    members: tuple[Member, ...]

    @property
    def device(self) -> Device:
        """On which this rank works."""
        return Device.parse(self.members[self.launch.rank].device)

    @property
    def budgets(self) -> tuple[DeviceBudget, ...]:
        """What every rank can count on, on the device of this one and on the CPU."""
        return least_of(self.places, self.launch.rank)

    @property
    def places(self) -> tuple[RankPlace, ...]:
        """Where every rank works."""
        return tuple(member.place for member in self.members)


def own_device(launch: Launch, *, on_cpu: bool) -> Device:
    """The accelerator of this rank: that of its number on its machine; the CPU where there is none."""
    there = () if on_cpu else present_accelerators()
    return there[min(launch.local_rank, len(there) - 1)] if there else CPU


@contextlib.contextmanager
def joined(
    launch: Launch,
    asked: Sequence[str],
    *,
    on_cpu: bool = False,
    came: Callable[[], None] = lambda: None,
    limits: Limits = LIMITS,
) -> Iterator[Joined]:
    """Meet the other ranks; leave them at the end, and say why where something was raised.

    `asked`: the words of the command line, which are the same for all. `on_cpu`: accelerators are not used.
    `came` is called when this rank has left word of itself: what goes wrong in it is heard from then on.
    Raises `ConfigError` on rank 0 for ranks that cannot work together, `RankLost` for those that do not come.
    """
    device = own_device(launch, on_cpu=on_cpu)
    accelerators = 0 if on_cpu else len(present_accelerators())
    own = _member(launch, asked, device, accelerators=accelerators)
    if launch.size == 1:
        yield Joined(launch, Alone(leaves=leaf_count(1)), (own,))
        return
    store = _store(launch, limits)
    word = Word(own.rank, own.host, own.pid)
    with Watch(_clone(store), word, launch.size, limits) as watch:
        came()
        try:
            members = _meet(store, own, launch, watch, limits)
            team = _opened(store, launch, device, watch)
            yield Joined(launch, team, members)
        except KeyboardInterrupt as stop:
            watch.leave("interrupted")
            error = watch.blamed()
            if launch.leads and not launch.launcher_has_store:
                watch.outlive()
            if error is not None:  # the launcher ends all ranks when one of them is gone
                raise _kept_as_well(error, stop) from None
            raise
        except BaseException as error:
            watch.leave("failed", error)
            if launch.leads:
                watch.outlive()
            elif not watch.lost:
                _wait_for_the_first(watch, limits)
            raise
        watch.leave("left")
        dist.destroy_process_group()
        if launch.leads:
            watch.outlive()


def _member(launch: Launch, asked: Sequence[str], device: Device, *, accelerators: int) -> Member:
    asked_of = budgets_of([device] if device.is_accelerator else [])
    budgets = {budget.device: (budget.total_bytes, budget.free_bytes) for budget in asked_of}
    main = budgets[CPU]
    share = (main[0] // launch.local_size, main[1] // launch.local_size)
    return Member(
        rank=launch.rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        local_rank=launch.local_rank,
        local_size=launch.local_size,
        asked=tuple(asked),
        versions=(
            ("gptq-cli", __version__),
            ("python", platform.python_version()),
            *((name, version(name)) for name in _LIBRARIES),
        ),
        accelerators=accelerators,
        device=str(device),
        card=name_on_machine(device) if device.is_accelerator else "",
        device_bytes=share if device == CPU else budgets[device],
        host_bytes=share,
    )


def _store(launch: Launch, limits: Limits) -> Any:
    """Where the ranks meet. A launcher that starts them again gives each start a place of its own."""
    try:
        found = TCPStore(
            launch.host,
            launch.port,
            is_master=launch.leads and not launch.launcher_has_store,
            timeout=timedelta(seconds=limits.join_seconds),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        raise RankLost(
            f"rank {launch.rank} cannot reach {launch.host}:{launch.port}, where the ranks meet: "
            f"{first_line(error)}",
            hint="MASTER_ADDR and MASTER_PORT must name the machine of rank 0, and a port that is open",
        ) from error
    return PrefixStore(f"gptq/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", found)


def _clone(store: Any) -> Any:
    """A connection of its own, so that a call that waits in one thread does not hold up another's."""
    return store.clone() if hasattr(store, "clone") else store


def _meet(store: Any, own: Member, launch: Launch, watch: Watch, limits: Limits) -> tuple[Member, ...]:
    """The words of all ranks; rank 0 has compared them."""
    store.set(f"member/{own.rank}", json.dumps(asdict(own)))
    if launch.leads:
        members = tuple(_waited(store, f"member/{rank}", rank, watch, limits) for rank in range(launch.size))
        found = tuple(_as_member(text) for text in members)
        gaps = _clock_gaps(store, launch.size, watch, limits)
        problem = wrong_launch(found, gaps)
        if problem is not None:
            raise problem
        store.set("members", json.dumps([asdict(member) for member in found]))
        return found
    _waited(store, "clock", 0, watch, limits)
    store.set(f"clock/{own.rank}", repr(time.time()))
    text = _waited(store, "members", 0, watch, limits)
    return tuple(_as_member(json.dumps(fields)) for fields in json.loads(text))


def _as_member(text: str | bytes) -> Member:
    fields = json.loads(text)
    for name in ("asked", "device_bytes", "host_bytes"):
        fields[name] = tuple(fields[name])
    fields["versions"] = tuple((name, found) for name, found in fields["versions"])
    return Member(**fields)


def _waited(store: Any, key: str, rank: int, watch: Watch, limits: Limits) -> str:
    """The word under `key`, once `rank` has left it."""
    deadline = time.monotonic() + limits.join_seconds
    while not store.check([key]):
        watch.check()
        if time.monotonic() > deadline:
            raise RankLost(
                f"rank {rank} did not come within {duration_words(limits.join_seconds)}",
                hint="see what it says on its machine; all of --nnodes must run the same command",
            )
        time.sleep(_POLL_SECONDS)
    return str(store.get(key).decode())


def _clock_gaps(store: Any, size: int, watch: Watch, limits: Limits) -> dict[int, float]:
    """How far the clock of each other rank is ahead of this one's, within the tenth of a second that it takes
    to ask."""
    store.set("clock", "now")
    gaps = {}
    for rank in range(1, size):
        text = _waited(store, f"clock/{rank}", rank, watch, limits)
        gaps[rank] = float(text) - time.time()
    return gaps


def wrong_launch(members: Sequence[Member], clock_gaps: dict[int, float]) -> ConfigError | None:
    """What makes it impossible that these ranks work together; None where nothing does."""
    first = members[0]
    checks: tuple[Callable[[Member], ConfigError | None], ...] = (
        lambda member: _other_words(first, member),
        lambda member: _other_versions(first, member),
        lambda member: _shared_accelerator(members, member),
        lambda member: _other_device(first, member),
        lambda member: _other_clock(member, clock_gaps.get(member.rank, 0.0)),
    )
    return next((found for check in checks for member in members if (found := check(member))), None)


def _other_words(first: Member, member: Member) -> ConfigError | None:
    if member.asked == first.asked:
        return None
    pairs = zip((*first.asked, ""), (*member.asked, ""), strict=False)
    mine, its = next(((a, b) for a, b in pairs if a != b), ("", ""))
    return ConfigError(
        f"{member} was started with {_word(its)} where rank 0 was with {_word(mine)}",
        hint="all ranks need the same command line, --out included: one checkpoint is written",
    )


def _word(text: str) -> str:
    return repr(text) if text else "nothing"


def _other_versions(first: Member, member: Member) -> ConfigError | None:
    others = dict(first.versions)
    for name, found in member.versions:
        if found != others.get(name):
            return ConfigError(
                f"{member} has {name} {found}, rank 0 has {others.get(name, 'none')}",
                hint="install the same versions on all machines, so that all ranks compute alike",
            )
    return None


def _shared_accelerator(members: Sequence[Member], member: Member) -> ConfigError | None:
    """Each process may see all accelerators of its machine, or one that only it sees."""
    shared = [
        other
        for other in members[: member.rank]
        if member.card and (other.host, other.card) == (member.host, member.card)
    ]
    if not shared:
        return None
    if member.accelerators >= member.local_size:
        return ConfigError(
            f"{member} would work on the same accelerator ({member.card}) as rank {shared[0].rank}; each "
            "needs one of its own",
            hint="LOCAL_RANK must be another one for each process of a machine",
        )
    return ConfigError(
        f"{member.host} has {number_of(member.accelerators, 'accelerator')} for "
        f"{member.local_size} processes; each needs one of its own",
        hint=f"torchrun --nproc-per-node {member.accelerators}, or --device-map cpu",
    )


def _other_device(first: Member, member: Member) -> ConfigError | None:
    kinds = [one.device.partition(":")[0] for one in (first, member)]
    if kinds[0] == kinds[1]:
        return None
    return ConfigError(
        f"{member} would work on {kinds[1]}, rank 0 on {kinds[0]}: they would wait for each other",
        hint="use machines that are alike, or --device-map cpu",
    )


def _other_clock(member: Member, gap: float) -> ConfigError | None:
    if abs(gap) <= MAX_CLOCK_GAP_SECONDS:
        return None
    way = "ahead of" if gap > 0 else "behind"
    return ConfigError(
        f"the clock of {member} is {duration_words(abs(gap))} {way} that of rank 0; at most "
        f"{duration_words(MAX_CLOCK_GAP_SECONDS)} are allowed",
        hint="set the clocks (NTP): the times of files say what changed when",
    )


def _opened(store: Any, launch: Launch, device: Device, watch: Watch) -> Ranks:
    """The process group of all ranks."""
    backend = _BACKENDS.get(device.kind, "gloo")
    if backend != "gloo" and not dist.is_backend_available(backend):
        backend = "gloo"
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", _clone(store)),
            rank=launch.rank,
            world_size=launch.size,
            timeout=timedelta(seconds=watch.limits.join_seconds),
        )
        patient()
    except RuntimeError as error:
        raise watch.blamed() or GptqError(
            f"the ranks cannot be connected ({backend}): {first_line(error)}",
            hint="GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network interface to use",
        ) from error
    return Ranks(launch.rank, launch.size, torch_device(CPU if backend == "gloo" else device), watch)


def _kept_as_well(error: GptqError, stop: KeyboardInterrupt) -> GptqError:
    """The error with what the interruption says of finished work."""
    if isinstance(stop, Interrupted):
        kept = stop.message.removeprefix("interrupted; ")
        error.hint = "; ".join(filter(None, (error.hint, kept, stop.hint)))
    return error


def _wait_for_the_first(watch: Watch, limits: Limits) -> None:
    """Stay until rank 0 has heard why this rank ends: the launcher ends all as soon as one has gone."""
    deadline = time.monotonic() + limits.silent_seconds
    while not watch.lost and time.monotonic() < deadline:
        time.sleep(limits.beat_seconds / 4)
