"""What a person can ask for: frozen dataclasses in the checkpoint's own words, judged here and nowhere else.

A wrong field raises `ConfigError` with the field, the value and the values allowed. Facts of the
world (does K divide, is there memory, does the directory exist) are judged by `gptq_cli.preflight`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from gptq_cli.errors import ConfigError
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.placement.placement import DeviceBudget

Bits = Literal[2, 3, 4, 8]
ActOrder = Literal["none", "static"]
ScaleSearch = Literal["minmax", "mse", "hessian"]
SolveFor = Literal["own", "dense"]
DType = Literal["auto", "float16", "bfloat16", "float32"]

GroupSize = int | Literal["auto"]
"""Input columns that share a scale, see `QuantizeConfig.group_size`."""
AUTO_GROUPS = (128, 64, 32)
"""What "auto" chooses from: the sizes that every reader of GPTQ checkpoints takes."""

Recipe = Literal["fast", "balanced", "best"]
Target = Literal["vllm", "sglang", "transformers", "exllamav2", "gptqmodel"]
"""Readers of GPTQ checkpoints whose rules are known."""
KernelChoice = Literal["auto", "torch", "dequantize", "gptqmodel"]
"""auto and torch: torch's int4 kernel where one fits; dequantize: never; gptqmodel: that package's choice."""

MIN_PAIRS = 16
"""Samples that both models run on, where there are so many; a quarter of them judges the target."""
ALLOWED_BITS: tuple[int, ...] = get_args(Bits)
INT32, INT64 = 2**31 - 1, 2**63 - 1
"""The largest count (two of them multiplied are still a number that torch holds), and the largest seed."""


def check_choice(name: str, value: object, allowed: tuple[object, ...], hint: str | None = None) -> None:
    """Raise `ConfigError` unless `value` is in `allowed`."""
    if value not in allowed:
        listed = ", ".join(str(item) for item in allowed)
        raise ConfigError(f"{name} is {value!r}; allowed: {listed}", hint=hint)


def check_int(name: str, value: object, least: int, hint: str | None = None, *, most: int = INT32) -> None:
    """Raise `ConfigError` unless `value` is a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; allowed: a whole number of at least {least}", hint=hint)
    if value > most:  # it may have thousands of digits, which Python does not write out
        raise ConfigError(f"{name} is above {most}; allowed: a whole number of at most {most}", hint=hint)


def parse_group_size(value: object) -> GroupSize:
    """A group size as a person writes it: "auto", a number, or the text of one. Raises `ConfigError`."""
    if value == "auto":
        return "auto"
    number = value
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,9}", value.strip(), re.ASCII):
        number = int(value)
    if isinstance(number, bool) or not isinstance(number, int) or (number != -1 and not 0 < number < INT32):
        raise ConfigError(
            f"group_size is {number!r}; allowed: -1 (one group a row), a positive whole number, or auto",
            hint="use --group-size auto, which finds one that divides",
        )
    return number


def parse_targets(names: Collection[str]) -> tuple[Target, ...]:
    """The readers called `names`, each once. Raises `ConfigError`."""
    for name in names:
        check_choice("target", name, get_args(Target))
    return tuple(dict.fromkeys(names))  # type: ignore[arg-type]  # judged above


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """How weights become codes. Field names are those of `quantize_config.json` where it has one."""

    bits: int = 4
    """Bits of a code: 2, 3, 4 or 8."""
    group_size: GroupSize = "auto"
    """Input columns that share a scale; -1: one group a row; "auto": the largest of 128, 64 and 32 that
    divides the input columns of every linear; `for_columns` puts the number there."""
    sym: bool = True
    """Zero point fixed at the middle code."""
    desc_act: bool = False
    """Solve columns by falling activation energy, groups follow that order and `g_idx` records it.
    Some servers refuse it; `act_order` gets the accuracy without."""
    act_order: ActOrder = "static"
    """Order of columns inside the solver when `desc_act` is off; "static" keeps groups in place."""
    damp_percent: float = 0.05
    """Fraction of the mean Hessian diagonal added to the diagonal."""
    true_sequential: bool = True
    """Later stages of a block see the quantized outputs of its earlier stages."""
    scale_search: ScaleSearch = "hessian"
    """How a group's scale is found: "minmax"; "mse": clip search on |error|^2.4 (as the original code);
    "hessian": clip search weighted by the Hessian diagonal."""
    positive_scales: bool = False
    """Forbid negative scales (sym only: the signed full range uses them)."""
    sweeps: int = 1
    """Cyclic coordinate-descent sweeps over the codes after the solve; 0: none."""
    refit: bool = True
    """Refit each group's scale in closed form before its codes are swept, where the loss falls."""
    solve_for: SolveFor = "dense"
    """What a linear's output should equal: "own", W times what the quantized model feeds it; "dense", what
    the dense model puts out there, as far as held-out samples bear that out."""
    dense_share: float = 0.25
    """Share of the calibration samples that the dense model runs on too, for `solve_for` "dense"; each costs
    a second forward."""
    column_batch: int = 128
    """The paper's B: columns of one lazy update. For speed: in exact arithmetic codes do not depend on it. In
    float32 sums are rounded in another order, and the error feedback amplifies that: in one measurement
    14 % of the codes differed, and the mean loss by 0.13 %."""

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, ALLOWED_BITS, "use --bits 4, which every server reads")
        parse_group_size(self.group_size)
        check_choice("act_order", self.act_order, get_args(ActOrder))
        check_choice("scale_search", self.scale_search, get_args(ScaleSearch))
        check_choice("solve_for", self.solve_for, get_args(SolveFor))
        if not (math.isfinite(self.damp_percent) and 0.0 < self.damp_percent < 1.0):
            raise ConfigError(
                f"damp_percent is {self.damp_percent}; allowed: a fraction above 0 and below 1 (0.05 is 5 %)"
            )
        check_int("sweeps", self.sweeps, 0)
        if not (math.isfinite(self.dense_share) and 0.0 < self.dense_share <= 1.0):
            raise ConfigError(
                f"dense_share is {self.dense_share}; allowed: a fraction above 0 and up to 1",
                hint="--solve-for own does without the dense model",
            )
        check_int("column_batch", self.column_batch, 1)

    def paired_samples(self, samples: int) -> int:
        """How many of `samples` the dense model runs on too: `dense_share` of them, and not fewer than tell
        how far to trust the target.
        """
        if self.solve_for == "own":
            return 0
        return min(samples, max(MIN_PAIRS, math.ceil(samples * self.dense_share - 1e-9)))

    def for_columns(self, in_features: Iterable[int]) -> QuantizeConfig:
        """The same with a number for the group size, for linears of these input columns.

        "auto" becomes the largest of `AUTO_GROUPS` that divides all of them, and the smallest where none
        does: preflight then names the linears that none divides.
        """
        if self.group_size != "auto":
            return self
        common = math.gcd(*in_features)
        found = (size for size in AUTO_GROUPS if common % size == 0)
        return replace(self, group_size=next(found, AUTO_GROUPS[-1]))

    @property
    def group_columns(self) -> int:
        """`group_size` as a number. Raises `ConfigError` where it is still "auto"."""
        if self.group_size == "auto":
            raise ConfigError("group_size is 'auto', which needs a model", hint="call for_columns first")
        return self.group_size

    def groups(self, in_features: int) -> int:
        """Groups in a row of `in_features` columns."""
        return 1 if self.group_columns == -1 else -(-in_features // self.group_columns)

    @property
    def checkpoint_format(self) -> str:
        """ "gptq" (v1, stores zero - 1) for symmetric codes, "gptq_v2" (stores the zero) otherwise."""
        return "gptq" if self.sym else "gptq_v2"


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """The options that a recipe stands for; each can be set by itself."""

    sweeps: int
    refit: bool
    solve_for: SolveFor
    dense_share: float


RECIPES: dict[Recipe, RecipeOptions] = {
    "fast": RecipeOptions(sweeps=0, refit=False, solve_for="own", dense_share=0.25),
    "balanced": RecipeOptions(sweeps=1, refit=True, solve_for="dense", dense_share=0.25),
    "best": RecipeOptions(sweeps=4, refit=True, solve_for="dense", dense_share=0.5),
}
"""Same format, same bits: they differ in time and accuracy. The fields' defaults are those of "balanced"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """Which text the Hessians are made of."""

    source: str = "pydoc"
    """"pydoc"; a .txt, .jsonl, .json or .parquet file; "-" for standard input; "wikitext2", "c4", or a hub
    data set `id[:config[:split[:column]]]`."""
    samples: int = 128
    """Windows of text."""
    seq_len: int = 2048
    """Tokens of a window."""
    seed: int = 0
    """Seed of the local generator that picks the windows."""
    batch_size: int | None = None
    """Samples of one micro-batch; None: as many as make 2048 tokens."""

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("calibration is empty; allowed: pydoc, a file, '-', or a hub data set")
        check_int("samples", self.samples, 1)
        check_int("seq_len", self.seq_len, 2)
        check_int("seed", self.seed, 0, most=INT64)
        if self.batch_size is not None:
            check_int("batch_size", self.batch_size, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which model, and what may be done to open it."""

    model: str
    """A directory or a hub id."""
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: DType = "auto"
    """Dtype to run and to store dense tensors in; "auto": the checkpoint's own."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("the model is empty; allowed: a directory or a hub id")
        if any("\ud800" <= letter <= "\udfff" for letter in self.model):
            raise ConfigError(
                f"the model is {self.model!r}, which is not UTF-8 text; tokenizers cannot be opened there",
                hint="give the directory a name in UTF-8",
            )
        check_choice("dtype", self.dtype, get_args(DType))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob:
    """Everything that `gptq quantize` was asked."""

    model: ModelRef
    out: str
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    device_map: DeviceMap = field(default_factory=lambda: DeviceMap.parse("auto"))
    max_memory: MaxMemory | None = None
    """The devices that may be used, and how much of each; None: all of all."""
    devices: tuple[DeviceBudget, ...] | None = None
    """Plan for these instead of the devices that are present (only with a dry run)."""
    max_shard_bytes: int = 5_000_000_000
    overwrite: bool = False
    strict: bool = False
    """A fallback to round-to-nearest ends the run with exit 5."""
    targets: tuple[Target, ...] = ()
    """Readers that must take the result: where one will not, preflight refuses."""
    command_line: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_targets(self.targets)
        if not self.out:
            raise ConfigError("out is empty; allowed: a directory to create", hint="add --out DIR")
        check_int("max_shard_bytes", self.max_shard_bytes, 1_000_000, "use --max-shard-size 5GB", most=INT64)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectJob:
    """Everything that `gptq inspect-map` was asked."""

    model: ModelRef
    device_map: DeviceMap
    max_memory: MaxMemory | None = None
    devices: tuple[DeviceBudget, ...] | None = None
    """Plan for these instead of the devices that are present."""
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    targets: tuple[Target, ...] = ()
    """Readers that must take the result."""
    asked: frozenset[str] = frozenset()
    """Fields of `quantize` that the person named: what the checkpoint would hold is judged by these alone,
    because where everything goes does not depend on it."""

    def __post_init__(self) -> None:
        parse_targets(self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is picked. Greedy when `temperature` is 0, which is the default."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    seed: int = 0
    """Of the draw; the global generators are left as they were."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise ConfigError(f"temperature is {self.temperature}; allowed: 0 (greedy) to 100")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p}; allowed: above 0, at most 1")
        check_int("top_k", self.top_k, 0)
        check_int("seed", self.seed, 0, most=INT64)
        if self.temperature == 0 and (self.top_p < 1.0 or self.top_k):
            narrowed = f"top_k is {self.top_k}" if self.top_k else f"top_p is {self.top_p}"
            raise ConfigError(
                f"{narrowed}, but temperature is 0, which is greedy",
                hint="add --temperature 0.7, or leave it out",
            )


GREEDY = Sampling()
HELD_OUT = "pydoc-heldout"
"""The text to measure on where none is named: calibration leaves it out by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadJob:
    """Everything that `gptq load` was asked."""

    path: str
    device_map: DeviceMap | None = None
    """None: the current accelerator, or the CPU where there is none."""
    dtype: DType = "auto"
    trust_remote_code: bool = False
    kernel: KernelChoice = "auto"
    compile: bool = False
    """Let torch.compile fuse what lies between the kernels."""
    prompt: str | None = None
    raw: bool = False
    """Give the prompt to the model as it stands, without the chat template."""
    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    evaluate: str | None = None
    """Text to measure perplexity on: any source that `CalibrationConfig.source` takes."""
    seq_len: int = 512
    windows: int = 64
    against: str | None = None
    """The dense model to compare with: a directory or a hub id."""
    max_kl: float | None = None
    """The job fails (exit 5) where KL(dense ‖ quantized) is above this."""
    max_perplexity: float | None = None
    bench: bool = False
    verify: bool = False
    targets: tuple[Target, ...] = ()
    """Readers that should take the checkpoint; exit 5 where one will not."""

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, get_args(DType))
        check_choice("kernel", self.kernel, get_args(KernelChoice))
        check_int("max_new_tokens", self.max_new_tokens, 1)
        check_int("seq_len", self.seq_len, 2)
        check_int("windows", self.windows, 1)
        parse_targets(self.targets)
        if self.prompt is not None:
            _text("prompt", self.prompt)
        if self.against == "":
            raise ConfigError("against is empty; allowed: a directory or a hub id")
        _gate("max_kl", self.max_kl, self.against, "--against DENSE")
        _gate("max_perplexity", self.max_perplexity, self.text, "--eval SOURCE")

    @property
    def text(self) -> str | None:
        """What is measured on: `evaluate`, and where only `against` is given, text held out by default."""
        return self.evaluate or (HELD_OUT if self.against is not None else None)

    @property
    def opens(self) -> bool:
        """Whether the model itself is wanted; --verify and --target alone are judged on the files."""
        proofs = (self.prompt is not None, self.evaluate is not None, self.against is not None, self.bench)
        return any(proofs) or not (self.verify or self.targets)


def _text(name: str, value: str) -> None:
    """Refuse what UTF-8 cannot hold: bytes of another encoding (Python keeps them as lone surrogates)."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        found = ord(value[error.start])
        what = f"byte 0x{found - 0xDC00:02x}" if 0xDC80 <= found <= 0xDCFF else f"half a pair, U+{found:04X},"
        raise ConfigError(
            f"{name} is not UTF-8: {what} at character {error.start + 1}",
            hint="convert the text first, for instance with iconv -f latin1 -t utf-8",
        ) from error


def _gate(name: str, limit: float | None, measurement: str | None, needed: str) -> None:
    if limit is None:
        return
    if not (math.isfinite(limit) and limit >= 0):
        raise ConfigError(f"{name} is {limit}; allowed: a number of at least 0")
    if measurement is None:
        raise ConfigError(f"{name} is {limit}, but nothing is measured for it", hint=f"add {needed}")
