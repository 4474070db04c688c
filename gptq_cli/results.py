"""What a finished command knows: frozen reports, written to report.json and printed by `--json`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar, Literal

from gptq_cli.findings import Finding
from gptq_cli.placement import DeviceBudget, Placement
from gptq_cli.proof import Agreement, Bench, Gate, VerifyReport

Method = Literal["gptq", "rtn"]
Json = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

SCHEMA_VERSION = 1
"""Of every document that `document` makes; raised when a field changes its meaning or goes away."""

_PAIRS = re.compile(r"tuple\[tuple\[str, (?!\.\.\.)[^,\]]+\], \.\.\.\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearReport:
    """How one linear fared.

    Losses are tr(E H Eᵀ) / tr(W H Wᵀ) with H undamped: a relative output error. E = W - Q, or W' - Q where
    the linear was asked for the dense model's output (`alpha` above 0): W' are the weights that give it.
    """

    name: str
    """Full name, as in the checkpoint: `model.layers.3.self_attn.q_proj`."""
    in_features: int
    out_features: int
    loss: float
    rtn_loss: float
    """The same measure for plain round-to-nearest with min/max scales."""
    damp_percent: float
    """The damping that worked (a fraction of the mean diagonal)."""
    attempts: int
    """Factorisations tried: 1 when the first damping worked."""
    method: Method
    """"rtn" is a fallback, and is announced as one."""
    alpha: float = 0.0
    """How far the target went from the layer's own output (0) towards the dense model's (1)."""
    target_damp_percent: float = 0.0
    """The damping of that step (a fraction of the mean diagonal); 0 where there was none."""
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReport:
    """One decoder block: its time, its memory, its linears."""

    name: str
    seconds: float
    peak_bytes: tuple[tuple[str, int], ...]
    """(device, highest allocated bytes while the block was worked on)."""
    linears: tuple[LinearReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """The result of `gptq quantize`."""

    model: str
    revision: str | None
    out: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    checkpoint_format: str
    bits_per_weight: float
    """Stored bits of the quantized linears (codes, scales, zeros, g_idx) over their weights."""
    bits_per_parameter: float
    """8 · `size_after_bytes` over the parameters of the dense model, tied ones counted once: what the whole
    checkpoint takes, dense tensors and headers included."""
    quantized_share: float
    """Share of the model's parameters that is quantized, 0 to 1."""
    dense_modules: tuple[str, ...]
    """Modules with weights that stay dense, folded: `lm_head`, `model.embed_tokens`, …"""
    size_before_bytes: int
    size_after_bytes: int
    """Bytes of all safetensors files of the checkpoint, headers included."""
    dtype: str
    use_cuda_fp16: bool
    devices: tuple[str, ...]
    predicted_peak_bytes: tuple[tuple[str, int], ...]
    measured_peak_bytes: tuple[tuple[str, int], ...]
    samples: int
    seq_len: int
    tokens: int
    dataset_sha256: str
    calibration_source: str
    seed: int
    fallbacks: int
    """Linears whose method is not "gptq"."""
    warnings: tuple[str, ...]
    """All that were given: preflight's findings of that level, the engine's, and those of libraries."""
    seconds: float
    phase_seconds: tuple[tuple[str, float], ...]
    versions: tuple[tuple[str, str], ...]
    command_line: tuple[str, ...]
    settings: tuple[tuple[str, str | int | float | bool | None], ...]
    """Every field of the QuantizeConfig in force, recipe resolved."""
    blocks: tuple[BlockReport, ...]

    @property
    def linears(self) -> tuple[LinearReport, ...]:
        """All linears of all blocks, in model order."""
        return tuple(linear for block in self.blocks for linear in block.linears)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCount:
    """How many linears run on which kernel."""

    kernel: str
    linears: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The result of `gptq load`: what was opened, where, and what it proved."""

    json_properties: ClassVar[tuple[str, ...]] = ("ok",)

    path: str
    quantizer: str
    """`meta.quantizer` of the checkpoint, "" when it names none."""
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    checkpoint_format: str
    linears: int
    device_map: str
    device_reason: str
    dtype: str
    use_cuda_fp16: bool
    kernels: tuple[KernelCount, ...]
    load_seconds: float
    weight_bytes: int
    memory: tuple[tuple[str, int], ...]
    """(device, allocated bytes after loading; resident set size on cpu)."""
    prompt: str | None = None
    text: str | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    tokens_per_second: float = 0.0
    perplexity: float | None = None
    windows: int = 0
    seq_len: int = 0
    text_source: str = ""
    """What was measured on."""
    against: str | None = None
    agreement: Agreement | None = None
    bench: Bench | None = None
    gates: tuple[Gate, ...] = ()
    """The limits that were asked for; "passed" where the checkpoint is within."""
    verification: VerifyReport | None = None
    compiled: bool = False
    warnings: tuple[str, ...] = ()
    """All that were given, by preflight, while opening, and by what was measured."""

    @property
    def failures(self) -> tuple[str, ...]:
        """Closed gates, and what verification found wrong, one clause each; empty: exit 0, else 5."""
        verified = self.verification.failures if self.verification else ()
        return verified + tuple(gate.failure for gate in self.gates if not gate.passed)

    @property
    def ok(self) -> bool:
        """True when nothing failed."""
        return not self.failures


def to_json(value: object) -> Json:
    """`value` as JSON holds it.

    A dataclass becomes an object of its public fields and of the properties that its `json_properties`
    names, unless it has a text form of its own (`Device`, `DeviceMap`): then that text. A field of
    (name, value) pairs becomes an object too. NaN and the infinities, which JSON does not know, become
    null. Raises `TypeError` for a type that no report holds.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        if type(value).__str__ is not object.__str__:
            return str(value)
        document: dict[str, Json] = {}
        for item in fields(value):
            if item.name.startswith("_"):
                continue
            held = getattr(value, item.name)
            pairs = isinstance(item.type, str) and _PAIRS.fullmatch(item.type) is not None
            document[item.name] = to_json(dict(held) if pairs else held)
        for name in getattr(value, "json_properties", ()):
            document[name] = to_json(getattr(value, name))
        return document
    raise TypeError(f"a report cannot hold {type(value).__name__}")


def document(report: object) -> dict[str, Json]:
    """The JSON document of a report: its fields after `schema_version`. This is report.json, and `--json`."""
    body = to_json(report)
    if not isinstance(body, dict):
        raise TypeError(f"a document is made of a report, not of {type(report).__name__}")
    return {"schema_version": SCHEMA_VERSION, **body}


Verdict = Literal["fits", "fits with warnings", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """What one device will have to hold at its highest moment, part by part. All in bytes."""

    json_properties: ClassVar[tuple[str, ...]] = ("needed_bytes", "fits", "spare_bytes")

    device: str
    total_bytes: int
    free_bytes: int
    """Free before anything of this job is on it."""
    limit_bytes: int
    """What may be used: the free bytes, or less where --max-memory says so."""
    weights_bytes: int
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
    def needed_bytes(self) -> int:
        """The predicted peak: the sum of all parts."""
        return (
            self.weights_bytes
            + self.working_bytes
            + self.hessian_bytes
            + self.activation_bytes
            + self.packing_bytes
            + self.baseline_bytes
        )

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
class QuantizePlan:
    """What `quantize --dry-run` adds to a map report."""

    bits: int
    group_size: int
    group_reason: str
    """Where the group size comes from; "" where it was asked for."""
    blocks: int
    linears: int
    stages: tuple[StagePlan, ...]
    quantized_share: float
    """Share of the parameters that will be quantized, 0 to 1."""
    bits_per_weight: float
    """Stored bits of the quantized linears (codes, scales, zeros, g_idx) over their weights."""
    bits_per_parameter: float
    """8 · `size_after_bytes` over the parameters of the dense model, tied ones counted once."""
    size_before_bytes: int
    size_after_bytes: int
    """Bytes of all tensors of the checkpoint, without the headers of its files."""
    samples: int
    seq_len: int
    seconds: float | None
    """An estimate from a short probe of this machine; None when no probe was made."""


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
    """Which plan was chosen and why, one sentence."""
    tree: tuple[TreeRow, ...]
    devices: tuple[DevicePlan, ...]
    offload: tuple[str, ...]
    """Modules that get a cpu-offload hook, in execution order."""
    offload_skipped: tuple[str, ...]
    """cpu entries without parameters: never hooked, their buffers move to the main device."""
    findings: tuple[Finding, ...]
    """Errors first."""
    verdict: Verdict
    plan: QuantizePlan | None = None
    """Present for --dry-run."""
    warnings: tuple[str, ...] = ()
    """All that were given: the findings of that level, and what else came up while this was made."""

    @property
    def ok(self) -> bool:
        """True when the job would start: exit 0, else 3."""
        return self.verdict != "refused"
