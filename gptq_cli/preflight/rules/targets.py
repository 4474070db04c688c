"""Rules about the targets, the readers of GPTQ checkpoints: will they take the result?

What each target accepts is in `gptq_cli.targets.rules`; those rules need shapes and settings only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from gptq_cli.config import QuantizeConfig, Target
from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.names import fold
from gptq_cli.planning.cases import JobCase
from gptq_cli.results.kept import BY_MODULE
from gptq_cli.rules import Remark, rule
from gptq_cli.targets.check import TARGETS, TargetFacts, TargetLinear, check_target
from gptq_cli.targets.rules import whole_groups, whole_words

_CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--no-quantize-head", {"quantize_head": False}),
    ("without --module", {"modules": ()}),
    ("--no-desc-act", {"desc_act": False}),
    ("--sym", {"sym": True}),
    ("--group-size 128", {"group_size": 128}),
    ("--group-size 64", {"group_size": 64}),
    ("--group-size 32", {"group_size": 32}),
    ("--group-size -1", {"group_size": -1}),
    ("--bits 4", {"bits": 4}),
    ("--bits 8", {"bits": 8}),
)
"""Option and fields, the change that costs least accuracy or size first."""


@rule("error", "warning")
def target(case: JobCase) -> list[Remark]:
    """A reader that --target names refuses what would be written, or serves it in a slower or narrower way.

    Better refused before the work than after it. The hint is the smallest change of the settings with which
    every named target takes the result.
    """
    facts = _facts(case.facts, case.work.quantize)
    found = []
    for reader in case.targets:
        said = check_target(reader, facts)
        errors = [finding for finding in said if finding.level == "error"]
        for findings in (errors, [finding for finding in said if finding.level == "warning"]):
            if not findings:
                continue
            found.append(
                Remark(
                    level="error" if findings is errors else "warning",
                    subject=f"--target {reader}",
                    message="; ".join(finding.message for finding in findings),
                    hint=_smallest_change(case, (reader,), (case.targets, (reader,)))
                    if findings is errors
                    else _without_warnings(case, reader),
                    modules=tuple(dict.fromkeys(name for f in findings for name in f.modules)),
                )
            )
    return found


@rule("warning", topics=("bits", "group_size", "sym", "desc_act"))
def readers_lost(case: JobCase) -> list[Remark]:
    """The settings are outside what some readers of GPTQ checkpoints serve.

    All of them read 4 bits, symmetric, with groups of 128, 64 or 32 and no `desc_act`. Name the readers that
    you need with --target: then losing one is an error.
    """
    facts = _facts(case.facts, case.work.quantize)
    lost: dict[str, list[Target]] = {}
    everyone = (
        whole_words.id,
        whole_groups.id,
    )  # what no target takes: rules about bits and groups refuse it
    for reader in TARGETS:
        errors = [f for f in check_target(reader, facts) if f.level == "error" and f.rule not in everyone]
        if errors and reader not in case.targets:
            lost.setdefault(errors[0].message, []).append(reader)
    return [
        Remark(
            subject=", ".join(readers),
            message=f"will not serve this checkpoint: {reason}",
            hint=_smallest_change(case, tuple(readers), (TARGETS, (*case.targets, *readers), tuple(readers))),
        )
        for reason, readers in lost.items()
    ]


def _smallest_change(
    case: JobCase, readers: tuple[Target, ...], choices: tuple[tuple[Target, ...], ...]
) -> str:
    """The fewest options that make all of the first of `choices` take the result, or all of the next."""
    for wanted in choices:
        change = _change(case, wanted, ("error",))
        if change is not None:
            return change
    names = " or ".join(readers)
    without = " ".join(f"--target {reader}" for reader in readers)
    leave = f": leave {without} out" if set(readers) & set(case.targets) else ""
    return f"no setting makes {names} take this model{leave}"


def _without_warnings(case: JobCase, reader: Target) -> str:
    """The fewest options with which the reader warns of nothing; "" where no option does that."""
    levels = ("error", "warning")
    change = _change(case, (reader,), levels)
    if change is None:
        half = replace(case, facts=replace(case.facts, dtype="float16"))
        said = check_target(reader, _facts(half.facts, half.work.quantize))
        change = None if any(f.level in levels for f in said) else "--dtype float16"
    return change or ""


def _change(case: JobCase, readers: tuple[Target, ...], levels: tuple[str, ...]) -> str | None:
    """The fewest options with which no reader says anything of these levels."""
    for change in _combined():
        fields = {name: value for _, held in change for name, value in held.items()}
        facts = _facts(case.facts, replace(case.work.quantize, **fields))
        if not any(f.level in levels for reader in readers for f in check_target(reader, facts)):
            return " ".join(option for option, _ in change)
    return None


def _combined() -> Iterator[tuple[tuple[str, dict[str, Any]], ...]]:
    """One change, then two, three and four together, each of another field."""
    for count in range(1, 5):
        for change in combinations(_CHANGES, count):
            if len({name for _, held in change for name in held}) == count:
                yield change


def _facts(model: ModelFacts, config: QuantizeConfig) -> TargetFacts:
    """The checkpoint that would be written, as a reader would find it.

    `config` may be another than that of the job: a change that is tried. Without settings by module the
    linears that they leave dense are quantized.
    """
    head = model.head if config.quantize_head else None
    by_module = () if config.modules else model.by_module
    linears = (*model.linears, *by_module, *((head,) if head is not None else ()))
    config = config.for_model((), head.name if head is not None else None)
    kept = model.kept if config.modules else tuple(k for k in model.kept if k.reason != BY_MODULE)
    partly = {fold(linear.name) for linear in linears} & {one.name for one in kept}
    return TargetFacts(
        bits=config.bits,
        group_size=config.group_columns,
        sym=config.sym and all(config.of_linear(linear.name).sym for linear in linears),
        desc_act=config.desc_act,
        checkpoint_format=config.checkpoint_format,
        dtype=model.dtype,
        linears=tuple(
            TargetLinear(
                name=linear.name,
                in_features=linear.in_features,
                out_features=linear.out_features,
                bits=config.of_linear(linear.name).bits,
                group_size=config.of_linear(linear.name).group_columns,
            )
            for linear in linears
        ),
        lm_head=head is not None,
        changed=any(config.changed(linear.name) for linear in linears if linear is not head),
        left_dense=bool(kept),
        modules_listed=bool(kept) and not partly,
        trivial_g_idx=not config.desc_act,
    )
