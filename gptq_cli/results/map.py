"""The report of `gptq inspect-map` and of a dry run: what goes where, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gptq_cli.findings import Finding
from gptq_cli.placement.placement import DeviceBudget, Placement
from gptq_cli.results.bits import BitChoice
from gptq_cli.results.kept import KeptDense, OwnSettings

Verdict = Literal["fits", "fits with warnings", "refused"]


DEVICE_PARTS = (
    ("weights_bytes", "weights"),
    ("ahead_bytes", "next block"),
    ("working_bytes", "working memory"),
    ("hessian_bytes", "Hessians"),
    ("activation_bytes", "activations"),
    ("packing_bytes", "packing"),
    ("baseline_bytes", "libraries"),
)
"""Field of `DevicePlan` and the word for it, in messages as in tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """What one device will have to hold at its peak, part by part. All in bytes."""

    json_properties: ClassVar[tuple[str, ...]] = ("needed_bytes", "fits", "spare_bytes")

    device: str
    total_bytes: int
    free_bytes: int
    """Free before anything of this job is on it."""
    limit_bytes: int
    """What may be used: the free bytes, or less where --max-memory says so."""
    weights_bytes: int
    """What is there at once: all of what rests there, and of what is streamed one block."""
    ahead_bytes: int = 0
    """The bytes of the next block, which are read while this one is worked on."""
    working_bytes: int
    """The largest block's copy while it is being quantized (moved in, and its widest stack in fp32)."""
    hessian_bytes: int
    """Hessians and the factorisation of the widest stage."""
    activation_bytes: int
    """Calibration activations."""
    packing_bytes: int
    """Codes and packed tensors of one stage."""
    baseline_bytes: int
    """Interpreter, libraries, device context."""

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Every part with its word, as `DEVICE_PARTS` orders them."""
        return tuple((word, getattr(self, name)) for name, word in DEVICE_PARTS)

    @property
    def needed_bytes(self) -> int:
        """The predicted peak: the sum of all parts."""
        return sum(size_bytes for _, size_bytes in self.parts)

    @property
    def predicted_peak_bytes(self) -> int:
        """What a measurement shows: resident memory on cpu, allocated memory (no context) elsewhere."""
        return self.needed_bytes - (self.baseline_bytes if self.device != "cpu" else 0)

    @property
    def fits(self) -> bool:
        """True when the predicted peak is within the limit."""
        return self.needed_bytes <= self.limit_bytes

    @property
    def spare_bytes(self) -> int:
        """What is left of the limit; negative when it does not fit."""
        return self.limit_bytes - self.needed_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeRow:
    """One line of the folded placement tree: a module, or a run of equal siblings on one device."""

    name: str
    """Last component(s), as shown: `model`, `layers`, `0-15`, `embed_tokens`."""
    path: str
    """Full dotted name; a run shows its range: `model.layers.0-15`."""
    depth: int
    devices: tuple[str, ...]
    """One device for a leaf of the tree, all devices below for an inner row."""
    size_bytes: int
    modules: int
    """How many siblings the row stands for."""
    parameters: bool
    """False: only buffers, or nothing."""
    leaf: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """The linears of a block that read the same input, as planned for the first block of its shape."""

    blocks: int
    """Blocks that look like this."""
    example: str
    """Name of the first such block."""
    linears: tuple[tuple[str, int, int], ...]
    """(name relative to the block, K, N)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTime:
    """A phase of the work on all blocks, by one process and by several."""

    phase: str
    alone_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksPlan:
    """What several processes that torchrun starts would gain: a prediction, see `planning.ranks`."""

    json_properties: ClassVar[tuple[str, ...]] = ("bytes_per_block",)

    processes: int
    seconds: float | None = None
    """None where no rates are known."""
    speed_up: float | None = None
    """Seconds of one process over these."""
    phases: tuple[PhaseTime, ...] = ()
    most_that_pay: int | None = None
    """So many processes; twice as many would gain less than 5 %."""
    sum_bytes_per_block: int
    """Sums over samples that leave a process for its costliest block."""
    code_bytes_per_block: int
    """Solved linears, as above."""
    factor_bytes_per_block: int = 0
    """Factors of Hessians that some processes make for all, while the others wait."""
    link_bytes_per_second: float
    """Assumed between one process and the others."""
    assumptions: tuple[str, ...] = ()
    """What the times rest on."""

    @property
    def bytes_per_block(self) -> int:
        """All that a process sends or waits for in the costliest block, but for some kilobytes of words."""
        return self.sum_bytes_per_block + self.code_bytes_per_block + self.factor_bytes_per_block


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """What the devices of one of several processes will have to hold, with its share of the work."""

    rank: int
    host: str
    devices: tuple[DevicePlan, ...]
    """Its accelerator, where it has one, and its share of the machine's main memory."""

    @property
    def name(self) -> str:
        """`rank 1 on node2`."""
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """What the processes of one machine will have to hold of its main memory together."""

    json_properties: ClassVar[tuple[str, ...]] = ("fits",)

    host: str
    processes: int
    needed_bytes: int
    limit_bytes: int

    @property
    def fits(self) -> bool:
        """True where it is enough for all."""
        return self.needed_bytes <= self.limit_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizePlan:
    """What `quantize --dry-run` adds to a map report."""

    bits: int
    group_size: int
    group_reason: str
    """Where the group size comes from; "" where it was asked for."""
    blocks: int
    linears: int
    stages: tuple[StagePlan, ...]
    own_settings: tuple[OwnSettings, ...] = ()
    """Linears whose bits, group size or symmetry differ from the rest."""
    bit_choice: BitChoice | None = None
    """How `--bits-per-weight` would be spent, as far as it is known; None without it."""
    head: tuple[str, int, int] | None = None
    """(name, K, N) of the output head, where it will be quantized."""
    quantized_share: float
    """Share of the parameters that will be quantized, 0 to 1."""
    bits_per_weight: float
    """Stored bits of the quantized linears (codes, scales, zeros, g_idx) over their weights."""
    bits_per_parameter: float
    """8 · `size_after_bytes` over the parameters of the dense model, tied ones counted once."""
    size_before_bytes: int
    size_after_bytes: int
    """Bytes of all files of the checkpoint with tensors; of the tensors alone where the run is refused."""
    snapshot_bytes: int
    """Bytes of the hidden states that are kept beside the checkpoint while the run works, so that an
    interrupted run goes on quickly; twice for a moment. Without room for them they are not kept."""
    gradient_bytes: int = 0
    """Bytes of gradients of the dense model that lie beside the checkpoint while the run works."""
    samples: int
    seq_len: int
    seconds: float | None
    """An estimate from a short probe of this machine; None when no probe was made."""
    waited_share: float | None = None
    """Share of the probe's time that its threads waited for a processor, 0 to 1: high where other work keeps
    this machine busy. None where it is not known."""
    writing_seconds: float | None = None
    """How much of them the model takes to write its calibration text; None where it writes none."""
    measuring_seconds: float | None = None
    """How much of them it takes to measure what fewer bits cost; None where that is known, or not asked."""
    ranks: RanksPlan | None = None
    """What several processes would gain; None where nobody asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimate:
    """How long the quantization would take."""

    seconds: float
    source: str
    """What it is counted from: a probe of this machine, or the data sheet of a card that was named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapReport:
    """The result of `gptq inspect-map` and of `gptq quantize --dry-run`."""

    json_properties: ClassVar[tuple[str, ...]] = ("ok",)

    model: str
    architecture: str
    dtype: str
    parameters: int
    weights_bytes: int
    blocks: int
    spec: str
    """The device map as asked for, normalised."""
    max_memory: str | None
    inventory: Literal["present", "given"]
    """Whether the devices are this machine's or came from --devices."""
    budgets: tuple[DeviceBudget, ...]
    placement: Placement | None
    """None when no placement could be made; the findings say why."""
    reason: str
    """Which plan was taken and why, one sentence."""
    tree: tuple[TreeRow, ...]
    streaming: tuple[str, ...] = ()
    """What is read from the files when, and where hidden states rest, in sentences."""
    devices: tuple[DevicePlan, ...]
    ranks: tuple[RankMemory, ...] = ()
    """Several processes: what the devices of each must hold; () for one."""
    hosts: tuple[HostMemory, ...] = ()
    """The machines of several processes."""
    offload: tuple[str, ...]
    """Modules that get a cpu-offload hook, in execution order."""
    offload_skipped: tuple[str, ...]
    """cpu entries without parameters: never hooked, their buffers move to the main device."""
    findings: tuple[Finding, ...]
    """Errors first."""
    verdict: Verdict
    kept_dense: tuple[KeptDense, ...] = ()
    """Linears of the blocks that stay dense, and why."""
    time: TimeEstimate | None = None
    """None where it was refused, or planned for devices that are not there without the name of a card."""
    plan: QuantizePlan | None = None
    """Present for --dry-run."""
    warnings: tuple[str, ...] = ()
    """All that were given: the findings of that level, and what else came up on the way."""

    @property
    def ok(self) -> bool:
        """True when the job would start: exit 0, else 3."""
        return self.verdict != "refused"
