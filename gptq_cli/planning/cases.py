"""What the rules look at: plain facts, gathered once, frozen.

A rule is a function from one of these cases to findings. It opens no file, asks no device and needs no
torch, so the same rule serves for this machine and for one that `--devices` describes.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass, replace

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.fields import Resume
from gptq_cli.model.facts import ModelFacts
from gptq_cli.model.source import SourceProblem
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.device_map import DeviceMap, DeviceRule, MaxMemory
from gptq_cli.placement.placement import DeviceBudget, Placement, RankPlace
from gptq_cli.readers import Target
from gptq_cli.results.map import DevicePlan


@dataclass(frozen=True, slots=True)
class Work:
    """The quantization that the memory must hold; without one, only the weights count."""

    quantize: QuantizeConfig
    calibration: CalibrationConfig
    ranks: int = 0
    """Processes that share it; 0: there is no launcher, so samples are not cut into leaves."""
    rank: int | None = None
    """Which of them is looked at; None: the largest share of any counts."""

    @property
    def paired_samples(self) -> int:
        """Samples that the dense model runs on too."""
        return self.quantize.paired_samples(self.calibration.samples, self.calibration.seq_len)

    def on(self, facts: ModelFacts) -> Work:
        """The same for a model: the group size is a number, the head has its bits, and no gradients are
        asked for where none can be taken."""
        linears = ((x.name, x.in_features) for x in facts.linears)
        head = facts.head.name if facts.head is not None else None
        settled = self.quantize.for_model(linears, head)
        if settled.fisher_tokens and gradient_obstacles(facts, self.ranks):
            settled = replace(settled, fisher_tokens=0)
        return replace(self, quantize=settled)


def gradient_obstacles(facts: ModelFacts, ranks: int) -> tuple[str, ...]:
    """Why gradients of the dense model cannot be taken block by block; () where they can."""
    reasons = (
        ("the model's own code runs between its blocks", bool(facts.between)),
        ("blocks share weights", bool(facts.shared)),
        (f"{ranks} processes share the work, and gradients are taken by one", ranks > 1),
    )
    return tuple(words for words, holds in reasons if holds)


@dataclass(frozen=True, slots=True)
class Environment:
    """Variables of the environment that change what a device index means."""

    local_rank: str | None = None
    visible: tuple[tuple[str, str], ...] = ()
    """(name, value): CUDA_VISIBLE_DEVICES and its like, where set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapCase:
    """A device map asked of a model on a machine."""

    spec: DeviceMap
    facts: ModelFacts
    budgets: tuple[DeviceBudget, ...]
    max_memory: MaxMemory | None = None
    work: Work | None = None
    environment: Environment = Environment()
    given: bool = False
    """The budgets come from --devices."""
    places: tuple[RankPlace, ...] = ()
    """Where the processes of a launch work; `budgets` are then what each can count on. () without a
    launcher."""
    repair: str = ""
    """Options that a hint offers in place of `spec`, see `planning.repair`; "": not worked out."""

    def listed(self, device: Device) -> bool:
        """False where --max-memory names devices and not this one: nothing may be placed there."""
        return self.max_memory is None or self.max_memory.get(device) is not None

    def limit(self, device: Device) -> int | None:
        """Bytes of `device` that may be used; None where it is not there.

        Where --max-memory does not list the cpu, this process still needs its memory: the free bytes.
        """
        for budget in self.budgets:
            if budget.device == device:
                wanted = self.max_memory.get(device) if self.max_memory else None
                return budget.free_bytes if wanted is None else min(wanted, budget.free_bytes)
        return None

    def decides(self, device: Device) -> bool:
        """Whether what `device` can hold decides if a plan fits: not where the map names one that is not
        there, which is an error of its own."""
        return self.limit(device) is not None or device not in self.spec.devices

    def rule_for(self, name: str) -> DeviceRule | None:
        """The rule that decides about a tensor; where none covers it, the one for what it is tied to.

        A head that is the embedding goes where the embedding goes.
        """
        rule = self.spec.rule_for(name)
        if rule is not None:
            return rule
        tied = next((group for group in self.facts.tied if name in group), ())
        return next((found for other in tied if (found := self.spec.rule_for(other)) is not None), None)

    @property
    def accelerators(self) -> tuple[Device, ...]:
        """The accelerators that are there and may hold something, in order."""
        found = (b.device for b in self.budgets if b.device.is_accelerator)
        return tuple(sorted(device for device in found if self.limit(device) and self.listed(device)))

    @property
    def cpu_room(self) -> int | None:
        """Bytes that may be used on cpu for weights; None where it is not there, or not to be used."""
        return self.limit(CPU) if self.listed(CPU) else None

    @property
    def unlisted(self) -> tuple[DeviceBudget, ...]:
        """Devices that are there, but that --max-memory leaves out."""
        return tuple(budget for budget in self.budgets if not self.listed(budget.device))

    def with_unlisted(self, devices: Collection[Device]) -> MaxMemory:
        """--max-memory with all free memory of `devices`, in whole MiB, and without what is not there."""
        listed = self.max_memory.limits if self.max_memory else ()
        kept = tuple((device, size) for device, size in listed if self.limit(device) is not None)
        added = tuple((b.device, b.free_bytes >> 20 << 20) for b in self.unlisted if b.device in devices)
        return MaxMemory(kept + added)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedCase:
    """A case whose map became a placement."""

    case: MapCase
    placement: Placement
    plans: tuple[DevicePlan, ...]
    without_offload: str = ""
    """What would end the offload to cpu, as a hint; "" where nothing simple does."""
    in_runs: str = ""
    """Options with a map that has one run of blocks for each device, where that is worth a warning."""
    on_accelerators: str = ""
    """What would use the accelerators that a plain CPU run leaves idle, as a hint; "" where nothing fits."""

    @property
    def offload(self) -> tuple[str, ...]:
        """cpu entries that get a hook, in execution order."""
        return tuple(e.name for e in self.placement.entries if e.name in self._offloaded and e.parameters)

    @property
    def offload_skipped(self) -> tuple[str, ...]:
        """cpu entries without parameters, which never get one."""
        return tuple(e.name for e in self.placement.entries if e.name in self._offloaded and not e.parameters)

    @property
    def _offloaded(self) -> frozenset[str]:
        return frozenset(self.placement.offloaded)


@dataclass(frozen=True, slots=True)
class DeviceNeed:
    """What one device has to hold during work that comes before the blocks are worked on."""

    device: str
    needed_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedWork:
    """What an earlier run with the same output had finished before it ended."""

    folder: str
    resume: Resume
    """What was asked for."""
    words: str = ""
    """What there is, "blocks 0 to 17 of 32 from 2026-11-25 14:03, 41 min of work"."""
    problem: str = ""
    """Why it cannot be used."""
    differences: tuple[str, ...] = ()
    """In what that run and this one differ, of all that must be the same."""

    @property
    def continued(self) -> bool:
        """Whether the run goes on with it."""
        return self.resume != "never" and not self.problem and not self.differences


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFacts:
    """The state of the place that the checkpoint is to go to."""

    out: str
    exists: bool
    is_directory: bool
    is_empty_directory: bool
    is_checkpoint: bool
    """It holds a quantized model: what --overwrite may replace."""
    is_model_directory: bool
    """It is the directory that the model is read from, or holds it."""
    writable: bool
    parent: str
    """The closest directory that exists, or a file in its place."""
    free_bytes: int
    name_bytes: int = 0
    """Length of the last component, encoded."""
    longest_name_bytes: int = 255
    """What the file system allows."""
    free: str = ""
    """A place beside it where nothing is yet."""
    is_text: bool = True
    """The path is UTF-8 and holds no NUL."""
    is_fixed: bool = False
    """A directory that cannot be renamed over, as a mount point: its content is put into it."""
    is_removable: bool = True
    """What stands there can be removed to the last file."""
    failure: str = ""
    """What the system said when the run tried to make its working folder."""
    busy: str = ""
    """Who else writes there."""
    busy_hint: str = ""
    leftovers: tuple[str, ...] = ()
    """What is done about the leftovers of a run that ended."""
    folder_taken: str = ""
    """Where something that is not ours has the working folder's name."""
    why_taken: str = ""
    """Why that cannot be used, as a clause."""
    unlocked: str = ""
    """Why the place cannot be locked."""
    resume: Resume = "auto"
    """What to do about unfinished work."""
    work: UnfinishedWork | None = None
    """Unfinished work of a run that ended."""
    parent_is_file: bool = False
    """`parent` is no directory, so nothing can be made below it."""
    link_to_nothing: str = ""
    """What is said of `out` where it is a link without anything at its end."""

    @property
    def elsewhere(self) -> str:
        """The option that avoids what is there."""
        return f"--out {shlex.quote(self.free)}" if self.free else "give another --out"


@dataclass(frozen=True, slots=True)
class Capability:
    """What an accelerator can compute with."""

    device: Device
    name: str
    bfloat16: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCase:
    """A quantization asked of a model: everything that is not about devices."""

    facts: ModelFacts
    work: Work
    """Settled for the model."""
    fisher_tokens: int = 0
    """As they were asked for."""
    output: OutputFacts | None = None
    overwrite: bool = False
    problems: tuple[SourceProblem, ...] = ()
    capabilities: tuple[Capability, ...] = ()
    devices: tuple[Device, ...] = ()
    """Devices that blocks will compute on."""
    targets: tuple[Target, ...] = ()
    """Readers that must take the result."""
    tp: int = 1
    """Ranks of tensor parallelism on which they must."""
