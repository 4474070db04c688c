"""What a person can ask for: frozen dataclasses in the checkpoint's own words, validated here alone.

A wrong field raises `ConfigError` with the field, the value and the values allowed. Facts of the
world (does K divide, is there memory, does the directory exist) are checked by `gptq_cli.preflight`.

Fields made by `option` are options of the command line as well: their name, type, default and help are
written here, once, and `gptq_cli.cli.options` makes the options from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from gptq_cli.errors import ConfigError, DeviceMapError
from gptq_cli.fields import INT32, INT64, Resume, check_choice, check_int, check_utf8, option
from gptq_cli.placement.device import parse_capacity
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
"""Samples that both models run on, where there are so many; a quarter of them validates the goal."""
ALLOWED_BITS: tuple[int, ...] = get_args(Bits)


def parse_group_size(value: object) -> GroupSize:
    """A group size as a person writes it: "auto", a number, or the text of one. Raises `ConfigError`."""
    if value == "auto":
        return "auto"
    number = value
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,9}", value.strip(), re.ASCII):
        number = int(value)
    if isinstance(number, bool) or not isinstance(number, int) or (number != -1 and not 0 < number < INT32):
        raise ConfigError(
            f"group_size is {number!r}; allowed: -1 (one group per row), a positive whole number, or auto",
            hint="use --group-size auto, which finds one that divides",
        )
    return number


def parse_targets(names: Collection[str]) -> tuple[Target, ...]:
    """The readers called `names`, each once. Raises `ConfigError`."""
    for name in names:
        check_choice("target", name, get_args(Target))
    return tuple(dict.fromkeys(names))  # type: ignore[arg-type]  # checked above


def parse_shard_size(value: str | int) -> int:
    """Bytes of a file size as a person writes it: "5GB", "200MiB", 5_000_000_000. Raises `ConfigError`."""
    try:
        return parse_capacity(value)
    except DeviceMapError as error:
        hint = error.hint or "use --max-shard-size 5GB"
        raise ConfigError(f"max_shard_size: {error.message}", hint=hint) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """How weights become codes. Field names are those of `quantize_config.json` where it has one."""

    bits: int = option(4, "Bits of a code: 2, 3, 4 or 8.")
    group_size: GroupSize = option(
        "auto",
        "Input columns that share a scale; auto: 128, 64 or 32, the largest that divides every linear; "
        "-1: one group per row.",
        metavar="N",
    )
    """`for_columns` replaces "auto" with a number."""
    sym: bool = option(True, "Zero point fixed at the middle code, or free.", off="asym")
    desc_act: bool = option(False, "Groups follow the solving order (g_idx); some servers refuse it.")
    """Columns are solved by falling activation energy; `act_order` gains the same accuracy without g_idx."""
    act_order: ActOrder = option(
        "static", "Order of columns inside the solver, groups staying in place: static or none."
    )
    """Used when `desc_act` is off."""
    damp_percent: float = option(0.05, "Damping, a fraction of the mean Hessian diagonal.")
    true_sequential: bool = option(True, "Later stages of a block see its earlier ones quantized.")
    scale_search: ScaleSearch = option(
        "hessian", "How the scale of a group is found: minmax, mse or hessian."
    )
    """"mse": clip search on |error|^2.4 (as the original code); "hessian": weighted by its diagonal."""
    positive_scales: bool = option(
        False, "Forbid negative scales, or allow them (sym only).", off="signed-scales"
    )
    """Negative scales are how symmetric codes use the full signed range."""
    sweeps: int = option(1, "Coordinate-descent sweeps over the codes after the solve.")
    refit: bool = option(True, "Refit the scales where the loss falls.")
    """In closed form, each group's before its codes are swept."""
    solve_for: SolveFor = option(
        "dense", "Whose outputs a linear should match: own or dense (the dense model's)."
    )
    """"own": W times what the quantized model feeds it; "dense": what the dense model's linear gives, as far
    as held-out samples bear that out."""
    dense_share: float = option(
        0.25, "Share of the samples that the dense model runs on too, 0 to 1.", metavar="FRACTION"
    )
    """For `solve_for` "dense"; each of these samples costs a second forward."""
    column_batch: int = option(
        128, "Columns of one lazy update, for speed; codes vary as sums are rounded in another order."
    )
    """The paper's B. In exact arithmetic codes do not depend on it. In float32 the error feedback amplifies
    rounding: in one measurement 14 % of the codes differed, and the mean loss by 0.13 %."""

    @classmethod
    def of(cls, recipe: Recipe = "balanced", **given: Any) -> QuantizeConfig:
        """The configuration that `recipe` stands for, with the fields in `given` instead of its own.

        A value of None means "not given"; `group_size` may be text. Raises `ConfigError`.
        """
        check_choice("recipe", recipe, get_args(Recipe))
        own = {name: value for name, value in given.items() if value is not None}
        if "group_size" in own:
            own["group_size"] = parse_group_size(own["group_size"])
        return cls(**{**RECIPES[recipe], **own})

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
        """How many of `samples` the dense model runs on too: `dense_share` of them, and at least `MIN_PAIRS`,
        which it takes to find out how far the dense model's outputs are a good goal.
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


RECIPES: Mapping[Recipe, Mapping[str, Any]] = MappingProxyType(
    {
        "fast": {"sweeps": 0, "refit": False, "solve_for": "own"},
        "balanced": {},
        "best": {"sweeps": 4, "dense_share": 0.5},
    }
)
"""Fields in which a recipe differs from `QuantizeConfig()`; format and bits are the same."""
RECIPE_FIELDS = frozenset(name for overrides in RECIPES.values() for name in overrides)
"""Fields whose default depends on the recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """Which text the Hessians are made of."""

    source: str = option(
        "pydoc",
        "pydoc (offline), a text, JSONL or parquet file, - for stdin, wikitext2, c4, or a Hub data set "
        "id:config:split:column.",
        name="calibration",
        metavar="SOURCE",
    )
    samples: int = option(128, "Windows of text.")
    seq_len: int = option(2048, "Tokens per window.")
    seed: int = option(0, "Seed that picks the windows.")
    """Of a local generator; the global ones are left alone."""
    batch_size: int | None = option(None, "Windows per forward; default: 2048 tokens' worth.")

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("calibration is empty; allowed: pydoc, a file, '-', or a Hub data set")
        check_int("samples", self.samples, 1)
        check_int("seq_len", self.seq_len, 2)
        check_int("seed", self.seed, 0, maximum=INT64)
        if self.batch_size is not None:
            check_int("batch_size", self.batch_size, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which model, and what may be done to open it."""

    model: str
    """A directory or a Hub model id."""
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: DType = "auto"
    """Dtype to run and to store dense tensors in; "auto": the checkpoint's own."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("the model is empty; allowed: a directory or a Hub model id")
        if any("\ud800" <= letter <= "\udfff" for letter in self.model):
            raise ConfigError(
                f"the model is {self.model!r}, which is not UTF-8 text; tokenizers cannot be opened there",
                hint="give the directory a name in UTF-8",
            )
        check_choice("dtype", self.dtype, get_args(DType))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob:
    """Everything that `gptq quantize` needs to know."""

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
    """Readers that must take the result; where one will not, preflight refuses."""
    resume: Resume = "auto"
    command_line: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_targets(self.targets)
        check_choice("resume", self.resume, get_args(Resume))
        if not self.out:
            raise ConfigError("out is empty; allowed: a directory to create", hint="add --out DIR")
        check_int(
            "max_shard_bytes", self.max_shard_bytes, 1_000_000, "use --max-shard-size 5GB", maximum=INT64
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectJob:
    """Everything that `gptq inspect-map` needs to know."""

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
    """Fields of `quantize` that were given. Only these are checked against the model: where everything goes
    does not depend on what the checkpoint would hold."""

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
        check_int("seed", self.seed, 0, maximum=INT64)
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
    """Everything that `gptq load` needs to know."""

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
    """The dense model to compare with: a directory or a Hub model id."""
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
            check_utf8("prompt", self.prompt)
        if self.against == "":
            raise ConfigError("against is empty; allowed: a directory or a Hub model id")
        _gate("max_kl", self.max_kl, self.against, "--against DENSE")
        _gate("max_perplexity", self.max_perplexity, self.text, "--eval SOURCE")

    @property
    def text(self) -> str | None:
        """The text to measure on: `evaluate`, or where only `against` is given, `HELD_OUT`."""
        return self.evaluate or (HELD_OUT if self.against is not None else None)

    @property
    def opens(self) -> bool:
        """Whether the model itself is needed; --verify and --target alone read the files."""
        uses = (self.prompt is not None, self.evaluate is not None, self.against is not None, self.bench)
        return any(uses) or not (self.verify or self.targets)


def _gate(name: str, limit: float | None, measurement: str | None, needed: str) -> None:
    if limit is None:
        return
    if not (math.isfinite(limit) and limit >= 0):
        raise ConfigError(f"{name} is {limit}; allowed: a number of at least 0")
    if measurement is None:
        raise ConfigError(f"{name} is {limit}, but nothing is measured for it", hint=f"add {needed}")
