"""Rules about the targets, the readers of GPTQ checkpoints: will they take the result?

What each target accepts is in `gptq_cli.targets.rules`; those rules need shapes and settings only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from gptq_cli.config import QuantizeConfig
from gptq_cli.planning.cases import JobCase
from gptq_cli.planning.target_facts import target_facts, with_few_experts
from gptq_cli.preflight.rules.model_files import unsound
from gptq_cli.readers import Target
from gptq_cli.rules import Remark, rule
from gptq_cli.targets.check import check_target
from gptq_cli.targets.facts import TARGETS
from gptq_cli.targets.rules.formats import whole_groups, whole_words
from gptq_cli.targets.rules.parallel import tensor_parallel

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


@rule("error", "warning", "note")
def target(case: JobCase) -> list[Remark]:
    """A reader that --target names refuses what would be written, or serves it in a slower or narrower way.

    Better refused before the work than after it. The hint is the smallest change of the settings with which
    every named target takes the result. With --tp N, each matrix must divide over N devices.
    """
    if not _makes_a_checkpoint(case):
        return []
    facts = target_facts(case.facts, case.work.quantize, case.tp)
    few = replace(case, facts=with_few_experts(case.facts))
    found = []
    for reader in case.targets:
        said = check_target(reader, facts)
        found += [
            Remark(level="note", subject=f"--target {reader}", message=finding.message)
            for finding in said
            if finding.rule == tensor_parallel.id and finding.level == "note"
        ]
        errors = [finding for finding in said if finding.level == "error"]
        for findings in (errors, [finding for finding in said if finding.level == "warning"]):
            if not findings:
                continue
            found.append(
                Remark(
                    level="error" if findings is errors else "warning",
                    subject=f"--target {reader}",
                    message="; ".join(finding.message for finding in findings),
                    hint=_smallest_change(few, (reader,), (case.targets, (reader,)))
                    if findings is errors
                    else _without_warnings(few, reader),
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
    if not _makes_a_checkpoint(case):
        return []
    few = replace(case, facts=with_few_experts(case.facts))
    facts = target_facts(few.facts, case.work.quantize)
    lost: dict[str, list[Target]] = {}
    everyone = (whole_words.id, whole_groups.id)  # no target takes it: rules about bits and groups refuse it
    for reader in TARGETS:
        errors = [f for f in check_target(reader, facts) if f.level == "error" and f.rule not in everyone]
        if errors and reader not in case.targets:
            lost.setdefault(errors[0].message, []).append(reader)
    return [
        Remark(
            subject=", ".join(readers),
            message=f"will not serve this checkpoint: {reason}",
            hint=_smallest_change(few, tuple(readers), (TARGETS, (*case.targets, *readers), tuple(readers))),
        )
        for reason, readers in lost.items()
    ]


def _makes_a_checkpoint(case: JobCase) -> bool:
    """Whether there is something to say of a result: no settings help a model that cannot be quantized."""
    return bool(case.facts.linears) and not unsound(case)


def _smallest_change(
    case: JobCase, readers: tuple[Target, ...], choices: tuple[tuple[Target, ...], ...]
) -> str:
    """The fewest options that make all of the first of `choices` take the result, or all of the next."""
    for wanted in choices:
        change = _change(case, wanted, ("error",))
        if change is not None:
            return change
    for ranks in range(case.tp - 1, 0, -1):
        if _takes(replace(case, tp=ranks), readers, case.work.quantize, ("error",)):
            return f"--tp {ranks}"
    names = " or ".join(readers)
    rest = " ".join(f"--target {reader}" for reader in case.targets if reader not in readers)
    without = " ".join(f"--target {reader}" for reader in readers)
    leave = f"name {rest} alone" if rest else f"leave {without} out"
    way_out = f": {leave}" if set(readers) & set(case.targets) else ""
    return f"no setting makes {names} take this model{way_out}"


def _without_warnings(case: JobCase, reader: Target) -> str:
    """The fewest options with which the reader warns of nothing; "" where no option does that."""
    levels = ("error", "warning")
    change = _change(case, (reader,), levels)
    if change is None:
        half = replace(case, facts=replace(case.facts, dtype="float16"))
        change = "--dtype float16" if _takes(half, (reader,), half.work.quantize, levels) else None
    return change or ""


def _change(case: JobCase, readers: tuple[Target, ...], levels: tuple[str, ...]) -> str | None:
    """The fewest options with which no reader says anything of these levels."""
    for change in _combined():
        fields = {name: value for _, held in change for name, value in held.items()}
        if _takes(case, readers, replace(case.work.quantize, **fields), levels):
            return " ".join(option for option, _ in change)
    return None


def _takes(
    case: JobCase, readers: tuple[Target, ...], config: QuantizeConfig, levels: tuple[str, ...]
) -> bool:
    """Whether no reader says anything of these levels about the checkpoint of `config`."""
    facts = target_facts(case.facts, config, case.tp)
    return not any(f.level in levels for reader in readers for f in check_target(reader, facts))


def _combined() -> Iterator[tuple[tuple[str, dict[str, Any]], ...]]:
    """One change, then two, three and four together, each of another field."""
    for count in range(1, 5):
        for change in combinations(_CHANGES, count):
            if len({name for _, held in change for name in held}) == count:
                yield change
