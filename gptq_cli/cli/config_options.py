"""Options made from the fields of a configuration: name, type, default and help stand in `gptq_cli.config`.

    @with_config_options
    def command(context: typer.Context, *, codes: Codes) -> None:
        config = QuantizeConfig.of(**codes)

A parameter of such a type stands for several options; the command gets their values by the names of the
fields. An option whose default depends on the recipe has the value None where it is not given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from gptq_cli.cli import completion
from gptq_cli.cli.options import CALIBRATION, RECIPE, SOLVER, lines_of_variable, option
from gptq_cli.cli.preset import earlier_run
from gptq_cli.cli.run_again import EarlierRun
from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.module_settings import AskedBefore, ModuleRule, parse_module_rules
from gptq_cli.recipes import RECIPE_FIELDS

Command = TypeVar("Command", bound=Callable[..., Any])
_COMPLETED = {
    "bits": completion.bits,
    "group_size": completion.group_sizes,
    "sources": completion.texts,
}
"""Fields whose values a shell can complete."""
_METAVARS: dict[Any, str] = {bool: "", int: "N", float: "X"}


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """Fields of a configuration that are options of a command, and their panel on the help page."""

    config: type
    panel: str
    names: tuple[str, ...]

    def parameters(self) -> Iterator[tuple[str, inspect.Parameter]]:
        """Each field's name, and the parameter that Typer makes its option of."""
        kinds = get_type_hints(self.config)
        for item in fields(self.config):
            if item.name not in self.names:
                continue
            kind, default, text = _typed(kinds[item.name]), item.default, item.metadata["help"]
            if kind == list[str] | None:
                default = None
            if self.config is QuantizeConfig and item.name in RECIPE_FIELDS:
                kind, default = kind | None, None
                text = text.removesuffix(".") + "; default: --recipe's."
            name = item.metadata.get("name", item.name)
            typer_option = option(
                _spelling(name, kind, item.metadata.get("off")),
                text,
                self.panel,
                item.metadata.get("metavar", _metavar(kind)),
                complete=_COMPLETED.get(item.name),
                callback=lines_of_variable if kind == list[str] | None else None,
            )
            yield (
                item.name,
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=Annotated[kind, typer_option],
                ),
            )


CODES = ("bits", "bits_per_weight", "group_size", "sym", "desc_act", "quantize_head")
"""Fields that say what a checkpoint holds; the others say how it is found."""
_SOLVER = tuple(item.name for item in fields(QuantizeConfig) if item.name not in (*CODES, "modules"))

Codes = Annotated[Mapping[str, Any], ConfigFields(QuantizeConfig, RECIPE, CODES)]
Solver = Annotated[Mapping[str, Any], ConfigFields(QuantizeConfig, SOLVER, _SOLVER)]
Text = Annotated[
    Mapping[str, Any],
    ConfigFields(CalibrationConfig, CALIBRATION, tuple(item.name for item in fields(CalibrationConfig))),
]
SolverMemory = Annotated[
    Mapping[str, Any],
    ConfigFields(
        QuantizeConfig,
        SOLVER,
        ("true_sequential", "solve_for", "dense_share", "fisher_tokens", "tune_epochs"),
    ),
]
"""What of the solver changes how much memory a job needs."""
TextSize = Annotated[
    Mapping[str, Any], ConfigFields(CalibrationConfig, CALIBRATION, ("samples", "seq_len", "batch_size"))
]


_SOURCES = ("DEFAULT", "DEFAULT_MAP", "ENVIRONMENT", "COMMANDLINE")
"""Where a value comes from, the weakest first; a preset is the second."""


def bits_given(context: typer.Context, codes: Mapping[str, Any], module: list[str] | None) -> dict[str, Any]:
    """`codes` and the settings by module, as a configuration takes them.

    With one of bits and bits_per_weight, where one of them comes from a stronger source; with both where they
    come from the same, which is an error; without bits where neither is given.
    """
    strength = {name: _strength(context, name) for name in ("bits", "bits_per_weight")}
    most = max(strength.values())
    asked = codes["bits_per_weight"] is not None
    weaker = {name for name, own in strength.items() if asked and own < most}
    given = {name: None if name in weaker else value for name, value in codes.items()}
    given["module"] = module
    earlier = earlier_run(context)
    if earlier is not None:
        given |= _without_its_choice(context, earlier, given)
    return {"modules" if name == "module" else name: value for name, value in given.items()}


def asked_before(context: typer.Context, quantize: QuantizeConfig) -> AskedBefore | None:
    """What counts where the report of this run is given other bits: None where nothing is left of the choice
    of an earlier run. `quantize`: the settings of this one."""
    earlier = earlier_run(context)
    if earlier is None or earlier.asked is None:
        return None
    if any(_stronger(context, name) for name in ("bits", "bits_per_weight", "module")):
        return None
    modules, held = earlier.asked["module"], earlier.asked["quantize_head"]
    if _stronger(context, "quantize_head"):
        held = quantize.quantize_head
        modules = modules if held else _without_head(modules, earlier)
    return AskedBefore(modules=tuple(map(str, modules)), quantize_head=held)


def _without_its_choice(
    context: typer.Context, earlier: EarlierRun, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Of what stands in the report of a run, and is not `given` otherwise: without what its budget chose
    where other bits are asked for, and without settings of the head where that is not to be quantized."""
    held = {name: given[name] for name in ("module", "quantize_head") if not _stronger(context, name)}
    if earlier.asked is not None and (_stronger(context, "bits") or _stronger(context, "bits_per_weight")):
        held = {name: earlier.asked[name] for name in held}
    if "module" in held and _stronger(context, "quantize_head") and not given["quantize_head"]:
        held["module"] = _without_head(held["module"] or (), earlier)
    return held


def _without_head(modules: Sequence[str], earlier: EarlierRun) -> list[ModuleRule]:
    return [rule for rule in parse_module_rules(modules) if rule.pattern != earlier.head]


def _stronger(context: typer.Context, name: str) -> bool:
    """Whether a flag or the environment says otherwise than a preset."""
    return _strength(context, name) > _SOURCES.index("DEFAULT_MAP")


def _strength(context: typer.Context, name: str) -> int:
    source = context.get_parameter_source(name)
    return _SOURCES.index(source.name) if source is not None and source.name in _SOURCES else 0


def with_config_options(command: Command) -> Command:
    """`command` as Typer reads it: each parameter of `ConfigFields` replaced by the options of its fields."""
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    sources: dict[str, dict[str, str]] = {}
    for parameter in signature.parameters.values():
        group = next(
            (item for item in get_args(parameter.annotation) if isinstance(item, ConfigFields)), None
        )
        if group is None:
            parameters.append(parameter)
            continue
        made = dict(group.parameters())
        parameters.extend(made.values())
        sources[parameter.name] = {field: one.name for field, one in made.items()}

    def run(**given: Any) -> Any:
        groups = {
            group: {field: given.pop(name) for field, name in names.items()}
            for group, names in sources.items()
        }
        return command(**given, **groups)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run  # type: ignore[return-value]  # it takes the options in place of their groups


def _typed(kind: Any) -> Any:
    """The type that the command line reads: a number or a word is text, which the configuration reads; so is
    each of several things, for which the option is repeated."""
    if get_origin(kind) is tuple:
        return list[str] | None
    if get_origin(kind) in (Union, UnionType) and any(get_origin(part) is Literal for part in get_args(kind)):
        return str
    return kind


def _spelling(name: str, kind: Any, off: str | None) -> str:
    """`--group-size`; `--refit/--no-refit`; `--sym/--asym`."""
    option = "--" + name.replace("_", "-")
    if bool not in (kind, *get_args(kind)):
        return option
    return f"{option}/--{off or 'no-' + name.replace('_', '-')}"


def _metavar(kind: Any) -> str:
    alternatives = get_args(kind) if NoneType in get_args(kind) else (kind,)
    return next((_METAVARS[part] for part in alternatives if part in _METAVARS), "KIND")
