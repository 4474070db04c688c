"""What the rules look at: plain facts, gathered once, frozen.

A rule is a function from one of these cases to findings. It opens no file, asks no device and needs no
torch, so the same rule judges this machine and one that `--devices` describes.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptq_cli.config import CalibrationConfig, QuantizeConfig, Target
from gptq_cli.device import Device
from gptq_cli.device_map import DeviceMap, MaxMemory
from gptq_cli.model.source import SourceProblem
from gptq_cli.placement import DeviceBudget, ModelFacts, Placement
from gptq_cli.results import DevicePlan


@dataclass(frozen=True, slots=True)
class Work:
    """The quantization that the memory must hold; without one, only the weights count."""

    quantize: QuantizeConfig
    calibration: CalibrationConfig


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

    def limit(self, device: Device) -> int | None:
        """Bytes of `device` that may be used; None where it is not there."""
        for budget in self.budgets:
            if budget.device == device:
                wanted = self.max_memory.get(device) if self.max_memory else None
                return budget.free_bytes if wanted is None else min(wanted, budget.free_bytes)
        return None

    @property
    def accelerators(self) -> tuple[Device, ...]:
        """The accelerators that are there and may hold something, in order."""
        found = (b.device for b in self.budgets if b.device.is_accelerator)
        return tuple(sorted(device for device in found if self.limit(device)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedCase:
    """A case whose map became a placement."""

    case: MapCase
    placement: Placement
    plans: tuple[DevicePlan, ...]
    without_cpu: str = ""
    """What would keep everything on the accelerators, and its price; "" where nothing simple does."""

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
    """The closest directory that exists."""
    free_bytes: int
    name_bytes: int = 0
    """Length of the last component, encoded."""
    longest_name_bytes: int = 255
    """What the file system allows."""
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
    unlocked: str = ""
    """Why the place cannot be locked."""


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
    output: OutputFacts | None = None
    overwrite: bool = False
    problems: tuple[SourceProblem, ...] = ()
    capabilities: tuple[Capability, ...] = ()
    devices: tuple[Device, ...] = ()
    """Devices that blocks will compute on."""
    targets: tuple[Target, ...] = ()
    """Readers that must take the result."""
