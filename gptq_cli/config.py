"""What a person can ask for: frozen dataclasses in the checkpoint's own words, validated here alone.

A wrong field raises `ConfigError` with the field, the value and the values allowed. Facts of the
world (does K divide, is there memory, does the directory exist) are checked by `gptq_cli.preflight`.

Fields made by `option` are options of the command line as well: their name, type, default and help are
written here, once, and `gptq_cli.cli.options` makes the options from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, get_args

from gptq_cli.errors import ConfigError, DeviceMapError
from gptq_cli.fields import INT64, GroupSize, Resume, check_choice, check_int, option, parse_group_size
from gptq_cli.module_settings import ALLOWED_BITS, AskedBefore, ModuleRule, parse_module_rules, settings_for
from gptq_cli.placement.device import parse_capacity
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.placement.placement import DeviceBudget
from gptq_cli.readers import Target, parse_targets
from gptq_cli.recipes import OF_THE_DENSE_MODEL, Recipe, recipe_fields
from gptq_cli.text_sources import OWN_TEXT, TextSource, check_sources, parse_sources, shares

ActOrder = Literal["none", "static"]
ScaleSearch = Literal["minmax", "mse", "hessian"]
SolveFor = Literal["own", "dense"]
DType = Literal["auto", "float16", "bfloat16", "float32"]

AUTO_GROUPS = (128, 64, 32)
"""What "auto" chooses from: the sizes that every reader of GPTQ checkpoints takes."""

KernelChoice = Literal["auto", "torch", "dequantize", "gptqmodel"]
"""auto and torch: torch's int4 kernel where one fits; dequantize: never; gptqmodel: that package's choice."""

DEFAULT_SHARD_BYTES = 5_000_000_000
HEAD_BITS = 8
"""Bits of a quantized head where `--module` does not say otherwise."""
MIN_PAIRS = 16
"""Samples that both models run on, where there are so many; a quarter of them validates the goal."""
USUAL_TOKENS = 262_144
"""Of a calibration, 128 samples of 2048: where there are fewer, `dense_share` is a share of so many."""


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
    quantize_head: bool = option(
        False, "Quantize the output head too, at 8 bits unless --module says otherwise."
    )
    """It is the largest tensor of a small model; Transformers and ExLlamaV2 do not read it quantized."""
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
        0.25,
        "Share of the samples that the dense model runs on too, 0 to 1; of 262,144 tokens if those are more.",
        metavar="FRACTION",
    )
    """For `solve_for` "dense"; each of these samples costs a second forward, see `paired_samples`."""
    tune_epochs: int = option(
        0, "Passes over the samples that tune scales, norms and biases on the dense model's logits; 0: none."
    )
    """For `solve_for` "dense", on the samples that the dense model runs on too, when all blocks are done. A
    pass takes about four forwards of the whole model."""
    fisher_tokens: int = option(
        0, "Tokens whose gradients say how errors of a linear's outputs add up in the model's loss; 0: none."
    )
    """For `solve_for` "dense", whole samples of those that the dense model runs on too: see `gptq.feedback`.
    The dense model runs forward and back once on them before the work, and once more in it."""
    column_batch: int = option(
        128, "Columns of one lazy update, for speed; codes vary as sums are rounded in another order."
    )
    """The paper's B. In exact arithmetic codes do not depend on it. In float32 the error feedback amplifies
    rounding: in one measurement 14 % of the codes differed, and the mean loss by 0.13 %."""
    bits_per_weight: float | None = option(
        None,
        "Mixed bits, 2, 3, 4, 8 or dense by linear: at most X bits per parameter, counting the whole file.",
    )
    """In place of `bits`. Jobs measure what fewer bits cost each linear, and put what they choose in
    `modules`: see `planning.bits`."""
    modules: tuple[ModuleRule, ...] = option(
        (),
        "Settings of some linears: 'PATTERN=bits:8,group:64', 'PATTERN=dense'; patterns as in a device map. "
        "Repeatable, later ones win.",
        name="module",
        metavar="RULE",
    )
    """See `gptq_cli.module_settings`; `of_linear` applies them."""

    @classmethod
    def of(cls, recipe: Recipe = "balanced", **given: Any) -> QuantizeConfig:
        """The configuration that `recipe` stands for, with the fields in `given` instead of its own.

        A value of None means "not given"; `group_size` may be text. Raises `ConfigError`.
        """
        check_choice("recipe", recipe, get_args(Recipe))
        own = {name: value for name, value in given.items() if value is not None}
        if "group_size" in own:
            own["group_size"] = parse_group_size(own["group_size"])
        if "modules" in own:
            own["modules"] = parse_module_rules(own["modules"])
        if "bits" in own and "bits_per_weight" in own:
            raise ConfigError(
                f"bits is {own['bits']}, bits_per_weight is {own['bits_per_weight']:g}; allowed: one of them",
                hint="--bits-per-weight chooses bits for all linears, --module 'NAME=bits:8' for some",
            )
        return cls(**recipe_fields(recipe, own))

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
        for name, why in OF_THE_DENSE_MODEL.items():
            value = getattr(self, name)
            check_int(name, value, 0)
            if value and self.solve_for == "own":
                raise ConfigError(
                    f"{name} is {value}; allowed with solve_for own: 0, because {why}",
                    hint=f"--solve-for dense, or --{name.replace('_', '-')} 0",
                )
        check_int("column_batch", self.column_batch, 1)
        per_weight = self.bits_per_weight
        if per_weight is not None and not (math.isfinite(per_weight) and per_weight > 0.0):
            raise ConfigError(f"bits_per_weight is {per_weight}; allowed: a number above 0, such as 4.25")

    def paired_samples(self, samples: int, seq_len: int) -> int:
        """How many of `samples` the dense model runs on too: `dense_share` of them, or as many as that is of
        `USUAL_TOKENS`, and at least `MIN_PAIRS`. Tokens count, not their share, in finding out what the dense
        model's outputs are.
        """
        if self.solve_for == "own":
            return 0
        share = self.dense_share * max(samples, USUAL_TOKENS / seq_len)
        return min(samples, max(MIN_PAIRS, math.ceil(share - 1e-9)))

    def fisher_samples(self, samples: int, seq_len: int) -> int:
        """How many of the paired samples are gone back through: as many as hold `fisher_tokens`."""
        return min(self.paired_samples(samples, seq_len), -(-self.fisher_tokens // seq_len))

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

    def for_model(self, linears: Iterable[tuple[str, int]], head: str | None = None) -> QuantizeConfig:
        """The same with everything settled for a model of these linears, by name and input columns.

        The group size is a number, for the linears that have none of their own; the bits of the head `head`
        stand in front of `modules`, unless they are among these already.
        """
        first = ModuleRule(pattern=head, bits=HEAD_BITS) if head is not None and self.quantize_head else None
        rules = self.modules if first is None or first in self.modules else (first, *self.modules)
        if self.group_size != "auto":
            return self if rules is self.modules else replace(self, modules=rules)
        own = [columns for name, columns in linears if settings_for(rules, name).group_size is None]
        return replace(self.for_columns(own), modules=rules)

    def of_linear(self, name: str) -> QuantizeConfig:
        """The same with the bits, group size and symmetry that `modules` give the linear `name`."""
        if not self.modules:
            return self
        own = settings_for(self.modules, name)
        return _with_settings(self, own.bits, own.group_size, own.sym)

    def changed(self, name: str) -> dict[str, int | bool]:
        """The fields in which the linear `name` differs from the rest, by their name in `dynamic`."""
        own = self.of_linear(name)
        fields = ("bits", "group_size", "sym")
        return {item: getattr(own, item) for item in fields if getattr(own, item) != getattr(self, item)}

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
        """ "gptq" (v1, stores zero - 1) for symmetric codes, "gptq_v2" (stores the zero) otherwise.

        A checkpoint has one format, so one asymmetric module makes it the second; ask the configuration of
        the whole model, not that of a linear.
        """
        asymmetric = not self.sym or any(rule.sym is False for rule in self.modules)
        return "gptq_v2" if asymmetric else "gptq"


@lru_cache(maxsize=4096)
def _with_settings(
    config: QuantizeConfig, bits: int | None, group_size: int | None, sym: bool | None
) -> QuantizeConfig:
    return replace(
        config,
        bits=config.bits if bits is None else bits,
        group_size=config.group_size if group_size is None else group_size,
        sym=config.sym if sym is None else sym,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """Which text the Hessians are made of."""

    sources: tuple[TextSource, ...] = option(
        (TextSource("pydoc"),),
        "pydoc (offline), self (the model writes it), a text, JSONL or parquet file, - for stdin, wikitext2, "
        "c4, or a Hub data set id:config:split:column; several with weights: FILE*0.7, "
        "pydoc*0.3. Repeatable; default: pydoc.",
        name="calibration",
        metavar="SOURCE",
    )
    samples: int = option(128, "Windows of text.")
    seq_len: int = option(2048, "Tokens per window.")
    seed: int = option(0, "Seed that picks the windows.")
    """Of a local generator; the global ones are left alone."""
    batch_size: int | None = option(None, "Windows per forward; default: 2048 tokens' worth.")

    @classmethod
    def of(cls, sources: object = None, **given: Any) -> CalibrationConfig:
        """The configuration with these sources, as a person gives them (`text_sources.parse_sources`).

        A value of None means "not given". Raises `ConfigError`.
        """
        own = {name: value for name, value in given.items() if value is not None}
        return cls(**own) if sources is None else cls(sources=parse_sources(sources), **own)

    def __post_init__(self) -> None:
        check_sources(self.sources)
        many = len(self.sources)
        check_int("samples", self.samples, many, "one window for each source" if many > 1 else None)
        check_int("seq_len", self.seq_len, 2)
        check_int("seed", self.seed, 0, maximum=INT64)
        if self.batch_size is not None:
            check_int("batch_size", self.batch_size, 1)

    @property
    def words(self) -> str:
        """The sources as they are given: `chat.jsonl:messages*0.5, pydoc*0.5`."""
        return ", ".join(map(str, self.sources))

    @property
    def own_windows(self) -> int:
        """How many of the samples the model writes itself."""
        pairs = zip(self.sources, self.windows_by_source(), strict=True)
        return sum(windows for source, windows in pairs if source.name == OWN_TEXT)

    def windows_by_source(self) -> tuple[int, ...]:
        """How many of the samples come from each source."""
        return shares([source.weight for source in self.sources], self.samples)


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
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    overwrite: bool = False
    strict: bool = False
    """A linear that falls back to round-to-nearest, or is lost, ends the run with exit 5."""
    targets: tuple[Target, ...] = ()
    """Readers that must take the result; where one will not, preflight refuses."""
    tp: int = 1
    """Ranks of tensor parallelism on which they must."""
    resume: Resume = "auto"
    asked_before: AskedBefore | None = None
    command_line: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_targets(self.targets, self.tp)
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
    tp: int = 1
    """Ranks of tensor parallelism on which they must."""
    asked: frozenset[str] = frozenset()
    """Fields of `quantize` that were given. Only these are checked against the model: where everything goes
    does not depend on what the checkpoint would hold."""
    processes: int | None = None
    """So many, started by torchrun, would share the work; None: there is no launcher."""

    def __post_init__(self) -> None:
        parse_targets(self.targets, self.tp)
