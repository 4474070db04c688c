"""Where every tensor of a model lives, and the plain facts that such a plan is made from.

A `Placement` is a list of *entries*: disjoint dotted names, matched by whole components, that together cover
every parameter and buffer. One-device placements have the single entry "". Nothing here knows torch, so rules
can judge a plan for hardware that is not there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType

from gptq_cli.device import Device
from gptq_cli.device_map import MaxMemory
from gptq_cli.errors import DeviceMapError

DTYPE_BYTES = MappingProxyType(
    {
        "float64": 8,
        "int64": 8,
        "float32": 4,
        "int32": 4,
        "bfloat16": 2,
        "float16": 2,
        "int16": 2,
        "float8_e4m3fn": 1,
        "float8_e5m2": 1,
        "int8": 1,
        "uint8": 1,
        "bool": 1,
    }
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, as its shard's header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """In torch's words: "bfloat16"."""
    size_bytes: int
    shard: str
    """File name of the shard."""


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """One device that is there (or that `--devices` pretends is there)."""

    device: Device
    total_bytes: int
    free_bytes: int


def parse_inventory(text: str, accelerator: str = "cuda") -> tuple[DeviceBudget, ...]:
    """Read `--devices "cuda:0=24GiB,cpu=64GiB"`: devices to plan for, all free. Raises `DeviceMapError`."""
    limits = MaxMemory.parse(text, accelerator, what="devices").limits
    return tuple(DeviceBudget(device, size, size) for device, size in limits)


@dataclass(frozen=True, slots=True)
class PlacementEntry:
    """The module or tensor `name`, and everything below it, lives on `device`."""

    name: str
    device: Device
    size_bytes: int
    parameters: bool
    """False: nothing but buffers, or nothing at all. accelerate's offload hooks die on such a module."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The resolved map. `reason` says in one sentence who decided, and why."""

    entries: tuple[PlacementEntry, ...]
    main_device: Device
    """Where offloaded modules execute and where the model's inputs go."""
    reason: str
    _by_name: dict[str, Device] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {entry.name: entry.device for entry in self.entries})

    def device_of(self, name: str) -> Device:
        """The device of a module or tensor.

        A module above several entries has a device only if they agree; otherwise `DeviceMapError` is raised.
        """
        probe = name
        while True:
            if probe in self._by_name:
                return self._by_name[probe]
            if not probe:
                break
            probe = probe.rpartition(".")[0]
        below = {
            e.device for e in self.entries if not name or e.name.startswith(name + ".") or e.name == name
        }
        if len(below) == 1:
            return below.pop()
        where = "lies on several devices" if below else "is not in the placement"
        raise DeviceMapError(
            f"{name!r} {where}: {', '.join(str(d) for d in sorted(below)) or 'no entry covers it'}"
        )

    @property
    def devices(self) -> tuple[Device, ...]:
        """The distinct devices, accelerators first, then cpu."""
        return tuple(sorted({entry.device for entry in self.entries}))

    @property
    def offloaded(self) -> tuple[str, ...]:
        """Names of the cpu entries beside other devices, in model order; () for a plain CPU run."""
        if len(self.devices) < 2:
            return ()
        return tuple(entry.name for entry in self.entries if entry.device.kind == "cpu")

    @property
    def streams_blocks(self) -> bool:
        """True for a plain CPU run: quantizing then reads each block from the files when its turn comes."""
        return all(entry.device.kind == "cpu" for entry in self.entries)

    @property
    def size_bytes(self) -> tuple[tuple[Device, int], ...]:
        """(device, bytes of the weights and buffers on it)."""
        totals = dict.fromkeys(self.devices, 0)
        for entry in self.entries:
            totals[entry.device] += entry.size_bytes
        return tuple(totals.items())

    def accelerate_map(self) -> dict[str, int | str]:
        """The map in the spelling that accelerate and transformers treat alike: ints for indexes."""
        return {entry.name: entry.device.for_accelerate for entry in self.entries}


@dataclass(frozen=True, slots=True)
class TensorFact:
    """A parameter or a buffer of the skeleton; tied ones appear once, under their first name."""

    name: str
    elements: int
    size_bytes: int
    """In the dtype that the model will run in."""
    buffer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFact:
    """One linear that will be quantized: K = in_features, N = out_features."""

    name: str
    block: str
    in_features: int
    out_features: int
    stage: int = 0
    """Number of its stage inside the block, from 0."""
    chosen: bool = False
    """Tokens choose it (an expert); it is worked on in a wave of its like, see `engine.stages`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Everything that rules, budgets and plans need to know about a model; made from a meta skeleton."""

    model: str
    architecture: str
    """Class name: "LlamaForCausalLM"."""
    dtype: str
    """What the weights will be in while it runs: "bfloat16"."""
    hidden_size: int
    vocab_size: int = 0
    max_positions: int | None = None
    blocks: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    """Every named module in registration order, without the root."""
    order: tuple[str, ...] = ()
    """Modules in the order in which a forward first calls them; () where it could not be traced."""
    untraced: str = ""
    """Where and why a forward without data stopped; "" where it came to its end."""
    tensors: tuple[TensorFact, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    """Groups of parameter names that are one tensor."""
    linears: tuple[LinearFact, ...] = ()
    fused: tuple[str, ...] = ()
    """Parameters of three dimensions inside blocks: experts fused into one tensor, left dense."""
    already_quantized: str | None = None
    """The `quant_method` that the config names."""
    tensor_files_bytes: int = 0
    """Bytes of the checkpoint on disk."""

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one number in `dtype`."""
        return DTYPE_BYTES.get(self.dtype, 4)

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(tensor.elements for tensor in self.tensors if not tensor.buffer)

    @property
    def size_bytes(self) -> int:
        """Bytes of all parameters and buffers in the dtype the model runs in."""
        return sum(tensor.size_bytes for tensor in self.tensors)
