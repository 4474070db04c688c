"""The report of `gptq quantize`: a run, its blocks, its linears."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median_low
from typing import ClassVar, Literal, Self

from gptq_cli.findings import Finding
from gptq_cli.module_settings import AskedBefore
from gptq_cli.placement.schedule import Schedule
from gptq_cli.results.bits import BitChoice
from gptq_cli.results.kept import KeptDense, OwnSettings
from gptq_cli.results.load import LoadReport
from gptq_cli.results.push import PushReport
from gptq_cli.wording import number_of

Method = Literal["gptq", "rtn"]
Setting = str | int | float | bool | tuple[str, ...] | None
"""The value of an option."""


def finite_mean(values: Iterable[float]) -> float | None:
    """The mean of those that are finite; None where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearReport:
    """The result for one linear.

    Losses are tr(E H Eᵀ) / tr(W H Wᵀ) with H undamped: a relative output error. E = W - Q; where the
    goal is the dense model's output (`alpha` above 0), E = W' - Q with the weights W' that give that output.
    """

    name: str
    """Full name, as in the checkpoint: `model.layers.3.self_attn.q_proj`."""
    in_features: int
    out_features: int
    bits: int
    group_size: int
    """-1: one group per row."""
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
    """How far the goal moved from the layer's own output (0) towards the dense model's (1)."""
    target_damp_percent: float | None = None
    """The damping of that step (a fraction of the mean diagonal); None where there was none."""
    moved: float | None = None
    """How far the goal is from the weights, as a share of their size: ‖W' - W‖ / ‖W‖, of all linears of the
    stage; None where it did not move."""
    bounded_rows: int = 0
    """Rows of the stage that were to move by more than their size; they moved by just that."""
    tokens: int
    """Calibration tokens that it saw; an expert sees those that are routed to it."""
    routed: bool = False
    """It is one of several experts, which share the tokens of the block."""
    pooled: float = 0.0
    """The weight of its siblings' tokens in an expert's Hessian: above 0.5 where it saw fewer tokens than it
    has columns, 1 where it saw none."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsReport:
    """How many calibration tokens the experts of the model saw."""

    experts: int
    least_tokens: int
    median_tokens: int
    most_tokens: int
    few: int
    """Experts with fewer tokens than one of their linears has columns: its Hessian is mostly that of all
    experts of the block."""
    unreached: tuple[str, ...]
    """Experts that no token reached: their Hessians are those of all others."""

    @classmethod
    def of(cls, linears: Iterable[LinearReport]) -> Self | None:
        """What `linears` say of the experts among them, by the modules that hold these; None without any."""
        held = tuple(linears)
        tokens = tokens_of_experts(held)
        few = {_expert_of(x) for x in held if x.routed and x.tokens < x.in_features}
        if not tokens:
            return None
        return cls(
            experts=len(tokens),
            least_tokens=min(tokens.values()),
            median_tokens=median_low(tokens.values()),
            most_tokens=max(tokens.values()),
            few=len(few),
            unreached=tuple(name for name, seen in tokens.items() if seen == 0),
        )


def tokens_of_experts(linears: Iterable[LinearReport]) -> dict[str, int]:
    """Calibration tokens that each expert among `linears` saw, by the module that holds its linears."""
    tokens: dict[str, int] = {}
    for linear in linears:
        if linear.routed:
            expert = _expert_of(linear)
            tokens[expert] = min(linear.tokens, tokens.get(expert, linear.tokens))
    return tokens


def _expert_of(linear: LinearReport) -> str:
    return linear.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReport:
    """One decoder block: its time, its memory, its linears."""

    name: str
    seconds: float
    peak_bytes: tuple[tuple[str, int], ...]
    """(device, highest allocated bytes while the block was worked on)."""
    linears: tuple[LinearReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReport:
    """One start of the command: a run that was interrupted has several, and the last one finished it."""

    started: str
    """ISO 8601, with the offset from UTC."""
    host: str
    seconds: float
    """From its beginning to its end, or where it was killed, to the last block that it kept."""
    first_block: int
    """Number (from 0) of the first block that was its own to work on."""
    blocks: int
    """Blocks that it finished."""
    devices: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """One of several processes that worked together."""

    rank: int
    host: str
    device: str
    sent_bytes: int
    """To the others, in the last start."""
    sum_bytes: int = 0
    """Of these, sums over samples."""
    code_bytes: int = 0
    """Of these, solved linears."""
    factor_bytes: int = 0
    """Of these, factors of Hessians that it made for all."""
    waited_seconds: float
    """For the others, in the last start."""


def slowest_rank(ranks: Iterable[RankReport]) -> RankReport:
    """The one that the others waited for: it waited least. `ranks` has at least one."""
    return min(ranks, key=lambda one: one.waited_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningReport:
    """What became of tuning scales, norms and biases on the dense model's logits."""

    kl_before: float
    """KL(dense ‖ quantized) in nats, mean over the tokens of held-out samples, before any step."""
    kl_after: float
    """The same of what is stored."""
    part: float
    """How much of the way of the tuned values is gone; 0 where none of it made the KL smaller, and everything
    stays as it was solved."""
    epochs: int
    steps: int
    samples: int
    """Windows of text that gradients were taken on."""
    held_out_samples: int
    """Windows that decided."""
    scales: int
    """Scales that could move."""
    vector_numbers: int
    """Numbers of norms' gains and of biases that could."""
    seconds: float

    @property
    def words(self) -> str:
        """`KL 0.0512 -> 0.0391 on 16 held-out samples, 112 steps`; or that nothing is taken."""
        held = number_of(self.held_out_samples, "held-out sample")
        if not self.part:
            kept = f"KL {self.kl_before:.4g} does not fall"
            return f"nothing taken: {kept} on {held}"
        moved = f"KL {self.kl_before:.4g} -> {self.kl_after:.4g}"
        return f"{moved} on {held}, {number_of(self.steps, 'step')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextShare:
    """What a run took of one source of calibration text."""

    source: str
    weight: float
    """As it was given, relative to those of the other sources."""
    samples: int
    """Windows."""
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """The result of `gptq quantize`."""

    json_properties: ClassVar[tuple[str, ...]] = ("mean_loss", "mean_rtn_loss")

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
    """8 · `size_after_bytes` over the parameters of the dense model, tied ones counted once; dense
    tensors and headers are included."""
    quantized_share: float
    """Share of the model's parameters that is quantized, 0 to 1."""
    own_settings: tuple[OwnSettings, ...] = ()
    """Linears whose bits, group size or symmetry differ from the above."""
    bit_choice: BitChoice | None = None
    """How `--bits-per-weight` was spent; None without it."""
    asked_before: AskedBefore | None = None
    """Of a run of a report again: what counts where other bits are asked for; None: nothing was chosen."""
    kept_dense: tuple[KeptDense, ...] = ()
    """Linears of the blocks that stay dense, and why."""
    dense_modules: tuple[str, ...]
    """Modules with weights that stay dense, folded: `lm_head`, `model.embed_tokens`, …"""
    size_before_bytes: int
    size_after_bytes: int
    """Bytes of all safetensors files of the checkpoint, headers included."""
    source_format: str = "dense"
    """How the source's weights are stored: "dense", or `mxfp4, decoded to bfloat16 while read`."""
    dtype: str
    use_cuda_fp16: bool
    devices: tuple[str, ...]
    ranks: tuple[RankReport, ...] = ()
    """The processes that a launcher started, in order; () where one did all the work."""
    streaming: tuple[str, ...] = ()
    """What was read from the files when, and where hidden states rested, in sentences."""
    predicted_peak_bytes: tuple[tuple[str, int], ...]
    measured_peak_bytes: tuple[tuple[str, int], ...]
    samples: int
    seq_len: int
    tokens: int
    dataset_sha256: str
    calibration_source: str
    """All sources as one text."""
    calibration_texts: tuple[TextShare, ...] = ()
    """What was taken of each source."""
    seed: int
    fallbacks: int
    """Linears whose method is not "gptq"."""
    experts: ExpertsReport | None = None
    """None: the model has no experts that are quantized one by one."""
    findings: tuple[Finding, ...] = ()
    """What preflight found, errors excepted: with one of these there is no run."""
    warnings: tuple[str, ...]
    """All that were given: preflight's findings of that level, the engine's, and those of libraries."""
    seconds: float
    """Of all starts together."""
    predicted_seconds: float | None = None
    """What the whole run should have taken, from a probe of the machine at its start; None: it was too short
    to be worth a probe."""
    predicted_block_seconds: tuple[tuple[str, float], ...] = ()
    """(block, its share of that)."""
    starts: tuple[StartReport, ...] = ()
    """Every start of the command, this one last: more than one where it was interrupted and run again."""
    snapshot_bytes: int = 0
    """The largest snapshot of the hidden states that lay on the disk while the run worked."""
    phase_seconds: tuple[tuple[str, float], ...]
    """Of the last start; "blocks": of all blocks; "keep": what it took to keep finished blocks and
    snapshots, so that an interrupted run could have gone on."""
    versions: tuple[tuple[str, str], ...]
    command_line: tuple[str, ...]
    settings: tuple[tuple[str, Setting], ...]
    """Every option that it takes to run this again (`gptq quantize --config report.json`), by its name in a
    preset; recipe, group size and revision are resolved."""
    blocks: tuple[BlockReport, ...]
    head: LinearReport | None = None
    """The output head, where it was quantized."""
    tuning: TuningReport | None = None
    """None: nothing was asked to be tuned."""
    proof: LoadReport | None = None
    """What was measured of the checkpoint after it was put in place; None: nothing was asked for."""
    pushed: PushReport | None = None
    """The upload to the Hub; in report.json, which is written before it, None."""
    schedule: Schedule
    """How the run was planned: micro-batch, and per block its devices and whether forwards were parked."""

    @property
    def mean_loss(self) -> float | None:
        """The mean loss of all linears that have one."""
        return finite_mean(linear.loss for linear in self.linears)

    @property
    def mean_rtn_loss(self) -> float | None:
        """The same of plain round-to-nearest."""
        return finite_mean(linear.rtn_loss for linear in self.linears)

    @property
    def linears(self) -> tuple[LinearReport, ...]:
        """All linears of all blocks in model order, then the head where it was quantized."""
        inside = tuple(linear for block in self.blocks for linear in block.linears)
        return inside if self.head is None else (*inside, self.head)
