"""Every tensor of a checkpoint checked; the answer is findings, nothing is raised for what is wrong inside.

`checkpoint.open` checks names, shapes and dtypes from the headers of the files. What needs values is read
here, one linear at a time, and reduced to facts; the rules in `checkpoint.rules` say what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gptq_cli.checkpoint import rules as verify_rules
from gptq_cli.checkpoint.checkpoint import PackedInfo, QuantizedCheckpoint, trivial_g_idx
from gptq_cli.checkpoint.format import PARTS
from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.checkpoint.rules import HeadFacts, LinearFacts, OrderFacts, VerifyCase, ZerosFacts
from gptq_cli.checkpoint.target_facts import head_name, head_of, target_facts
from gptq_cli.checkpoint.tokenizer_facts import tokenizer_facts
from gptq_cli.checkpoint.zeros import read_zeros
from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.errors import CheckpointError, ModelError
from gptq_cli.findings import Finding
from gptq_cli.model.blocks import find_linears, shape
from gptq_cli.model.conversion import tied_groups
from gptq_cli.model.expert_linears import ExpertLinear
from gptq_cli.model.facts import dtype_name
from gptq_cli.model.readable import broken_settings
from gptq_cli.model.source import READABLE, SourceProblem
from gptq_cli.model.source_files import is_needed
from gptq_cli.model.streamed import StreamedReader
from gptq_cli.readers import Target
from gptq_cli.results.load import RuleResult, TargetReport, VerifyReport
from gptq_cli.rules import rules_in
from gptq_cli.targets.check import target_report
from gptq_cli.targets.facts import TargetFacts
from gptq_cli.wording import names_text

OnTensor = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""


def verify_checkpoint(
    path: str | Path,
    *,
    targets: tuple[Target, ...] = (),
    tp: int = 1,
    trust_remote_code: bool = False,
    on_tensor: OnTensor = lambda done, total: None,
) -> VerifyReport:
    """Check every tensor of the checkpoint in `path`, and whether `targets` take it, on `tp` ranks."""
    try:
        checkpoint = open_checkpoint(path, trust_remote_code=trust_remote_code)
    except (CheckpointError, ModelError) as error:
        if is_out_of_memory(error):
            raise
        return _unreadable(path, error)
    with checkpoint.reader() as reader:
        values = _read_values(checkpoint, reader, on_tensor)
        case = replace(
            _structure(checkpoint),
            linears=values.linears,
            not_finite=values.not_finite,
            untied=tuple(_untied(checkpoint, reader)),
        )
    case = _with_files_beside(case, checkpoint, trust_remote_code)
    reordered = any(
        linear.order is not None and linear.order.reorders and not linear.format.desc_act
        for linear in case.linears
    )
    return replace(
        _report(path, checkpoint, targets, tp=tp, trivial=not reordered),
        checks=_checks(case),
    )


def check_targets(
    path: str | Path, targets: tuple[Target, ...], *, tp: int = 1, trust_remote_code: bool = False
) -> VerifyReport:
    """Whether `targets` take the checkpoint on `tp` ranks, by its settings, headers and g_idx alone."""
    try:
        checkpoint = open_checkpoint(path, trust_remote_code=trust_remote_code)
    except (CheckpointError, ModelError) as error:
        if is_out_of_memory(error):
            raise
        return _unreadable(path, error)
    with checkpoint.reader() as reader:
        reordered = any(
            order_facts(info, reader.get(f"{info.source_name}.g_idx")).reorders
            for info in (*checkpoint.linears, *checkpoint.experts)
            if info.has_g_idx and not info.format.desc_act
        )
    return _report(path, checkpoint, targets, tp=tp, trivial=not reordered)


def check_structure(checkpoint: QuantizedCheckpoint) -> tuple[Finding, ...]:
    """What the rules find in names and configs, without the values of a tensor."""
    case = _structure(checkpoint)
    return tuple(finding for rule in rules_in(verify_rules) for finding in rule(case))


def _unreadable(path: str | Path, error: CheckpointError | ModelError) -> VerifyReport:
    defects = getattr(error, "problems", (error.message,))
    case = VerifyCase(path=str(path), defects=defects, defects_hint=error.hint or "")
    findings = tuple(verify_rules.unreadable(case))  # one by one, about the directory
    return VerifyReport(path=str(path), checks=(RuleResult(*verify_rules.PARTS[0], findings),))


def _report(
    path: str | Path,
    checkpoint: QuantizedCheckpoint,
    targets: tuple[Target, ...],
    *,
    tp: int,
    trivial: bool,
) -> VerifyReport:
    """The report without the checks of values."""
    facts = target_facts(checkpoint, trivial_g_idx=trivial, tp=tp)
    return VerifyReport(
        path=str(path),
        checks=(RuleResult(*verify_rules.PARTS[0], ()),),
        targets=_target_reports(targets, facts),
        tensors=len(checkpoint.tensors),
        linears=len(checkpoint.linears) + len(checkpoint.experts),
        size_bytes=checkpoint.packed_bytes,
        coverage=_coverage(checkpoint),
    )


def _target_reports(targets: tuple[Target, ...], facts: TargetFacts) -> tuple[TargetReport, ...]:
    return tuple(target_report(target, facts) for target in dict.fromkeys(targets))


def _checks(case: VerifyCase) -> tuple[RuleResult, ...]:
    """What the rules of each part of the checkpoint say."""
    rules = rules_in(verify_rules)
    results = []
    for part, about in verify_rules.PARTS:
        found = [finding for rule in rules if part in rule.topics for finding in rule(case)]
        if part == "files":  # kinds that preflight has rules for; most only make the checkpoint less useful
            found += [_finding(problem) for problem in case.problems]
        results.append(RuleResult(part, about, _together(found)))
    return tuple(results)


def _finding(problem: SourceProblem) -> Finding:
    """A problem that the checkpoint can be opened with here; not every reader can."""
    if problem.kind in READABLE:
        return Finding(rule=problem.kind, level="warning", subject=problem.subject, message=problem.message)
    return Finding(
        rule=problem.kind,
        level="error",
        subject=problem.subject,
        message=problem.message,
        hint=problem.hint,
    )


def _with_files_beside(case: VerifyCase, checkpoint: QuantizedCheckpoint, code: bool) -> VerifyCase:
    """The case with what is found out about settings and tokenizer by reading them."""
    problems = (*case.problems, *broken_settings(checkpoint.directory))
    case = replace(case, problems=problems)
    if any(one.kind == "no-tokenizer" or is_needed(one.subject) for one in problems):
        return case  # which says enough about the tokenizer
    return replace(case, tokenizer=tokenizer_facts(checkpoint.directory, trust_remote_code=code))


def _together(findings: list[Finding]) -> tuple[Finding, ...]:
    """One finding for all that differ in the subject alone."""
    groups: dict[Finding, list[str]] = {}
    for finding in findings:
        groups.setdefault(replace(finding, subject=""), []).append(finding.subject)
    return tuple(
        replace(
            finding,
            subject=names_text(subjects, 1),
            modules=tuple(subjects),
        )
        for finding, subjects in groups.items()
    )


def _structure(checkpoint: QuantizedCheckpoint) -> VerifyCase:
    """What the headers and the config say."""
    listed = _listed_modules(checkpoint)
    kept = tuple(name for name in checkpoint.keys.unexpected if checkpoint.format.of(name) is None)
    return VerifyCase(
        path=str(checkpoint.directory),
        notes=tuple(checkpoint.notes),
        has_config_copy=(checkpoint.directory / "quantize_config.json").is_file(),
        problems=checkpoint.files.problems,
        unexpected=tuple(name for name in checkpoint.keys.unexpected if name not in kept),
        kept=kept,
        head=_head_facts(checkpoint),
        dense=tuple(
            (name, _declared_dense(checkpoint, listed, name)) for name, _ in _dense_linears(checkpoint)
        ),
    )


def _head_facts(checkpoint: QuantizedCheckpoint) -> HeadFacts | None:
    name = head_name(checkpoint)
    if name is None:
        return None
    return HeadFacts(
        name=name,
        packed=head_of(checkpoint) is not None,
        declared=checkpoint.config_dict.get("lm_head") is True,
        tied=any(f"{name}.weight" in group for group in tied_groups(checkpoint.model)),
    )


def _declared_dense(checkpoint: QuantizedCheckpoint, listed: tuple[str, ...], name: str) -> bool:
    called = _names_in_files(checkpoint, name)
    return all(checkpoint.format.of(source) is None for source in called) or (
        bool(listed) and not any(name == item or name.endswith(f".{item}") for item in listed)
    )


def _names_in_files(checkpoint: QuantizedCheckpoint, name: str) -> tuple[str, ...]:
    """What `dynamic` calls the linear `name`: a dense expert is one of several tensors, or a part of one."""
    linear = checkpoint.model.get_submodule(name)
    if not isinstance(linear, ExpertLinear):
        return (name,)
    owner = name.removesuffix(f".{linear.tensor.linear(linear.role, linear.expert)}")
    origin = checkpoint.keys.origins.get(f"{owner}.{linear.tensor.leaf}")
    return (name,) if origin is None else tuple(s.removesuffix(".weight") for s in origin.sources)


def _listed_modules(checkpoint: QuantizedCheckpoint) -> tuple[str, ...]:
    groups = checkpoint.config_dict.get("modules_in_block_to_quantize")
    if not isinstance(groups, list):
        return ()
    return tuple(str(name) for group in groups if isinstance(group, list) for name in group)


def _dense_linears(checkpoint: QuantizedCheckpoint) -> Iterator[tuple[str, int]]:
    """(name, weights) of the linears in the blocks that are not packed."""
    packed = {info.name for info in (*checkpoint.linears, *checkpoint.experts)}
    for block in checkpoint.blocks:
        for name, linear in find_linears(checkpoint.model.get_submodule(block)).items():
            if f"{block}.{name}" not in packed:
                rows, columns = shape(linear)
                yield f"{block}.{name}", rows * columns


def _coverage(checkpoint: QuantizedCheckpoint) -> float:
    packed = sum(x.in_features * x.out_features for x in (*checkpoint.linears, *checkpoint.experts))
    dense = sum(size for _, size in _dense_linears(checkpoint))
    return packed / max(1, packed + dense)


@dataclass(frozen=True, slots=True)
class _Values:
    """What the tensors hold."""

    linears: tuple[LinearFacts, ...]
    not_finite: tuple[str, ...]
    """Dense tensors."""


def _read_values(checkpoint: QuantizedCheckpoint, reader: StreamedReader, on_tensor: OnTensor) -> _Values:
    """Read every tensor once, one linear at a time."""
    done, total = 0, len(checkpoint.tensors)
    packed_names: set[str] = set()
    linears, not_finite = [], []
    for info in (*checkpoint.linears, *checkpoint.experts):
        tensors = {
            part: reader.get(f"{info.source_name}.{part}")
            for part in PARTS
            if f"{info.source_name}.{part}" in reader
        }
        linears.append(linear_facts(info, tensors))
        packed_names |= {f"{info.source_name}.{part}" for part in tensors}
        done += len(tensors)
        on_tensor(done, total)
    for tensor in checkpoint.tensors:
        if tensor.name in packed_names:
            continue
        values = reader.get(tensor.name)
        if values.is_floating_point() and values.element_size() > 1 and not _sound(values):
            not_finite.append(tensor.name)
        done += 1
        on_tensor(done, total)
    return _Values(tuple(linears), tuple(not_finite))


def _untied(checkpoint: QuantizedCheckpoint, reader: StreamedReader) -> Iterator[tuple[str, str]]:
    """Tensors that the config ties and the files hold twice, with different values."""
    for names in tied_groups(checkpoint.model):
        held = [source for name in names if (source := checkpoint.keys.source_of(name)) in reader and source]
        for other in held[1:]:
            if not torch.equal(reader.get(held[0]), reader.get(other)):
                yield other, held[0]


def _sound(values: Tensor) -> bool:
    """Finite; or one infinite value alone, which is a bound that bounds nothing, as of Gemma 4's clamps."""
    return _finite(values) or (values.numel() == 1 and not bool(values.isnan().any()))


def _finite(values: Tensor) -> bool:
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def linear_facts(info: PackedInfo, tensors: dict[str, Tensor]) -> LinearFacts:
    """The values of one packed linear; shapes and dtypes are right already."""
    scales, qweight, g_idx = tensors["scales"], tensors["qweight"], tensors.get("g_idx")
    finite = _finite(scales)
    zeros = read_zeros(tensors["qzeros"], info.format, info.out_features)
    return LinearFacts(
        name=info.source_name,
        format=info.format,
        scales_finite=finite,
        scales_zero=finite and bool((scales == 0).any()),
        scales_negative=finite and bool((scales < 0).any()),
        scales_dtype=dtype_name(scales.dtype),
        codes_constant=qweight.numel() > 1 and bool((qweight == qweight[0, 0]).all()),
        order=order_facts(info, g_idx) if g_idx is not None else None,
        zeros=ZerosFacts(stored=zeros.stored, known=zeros.known, any_zero=bool((zeros.values == 0).any())),
    )


def order_facts(
    info: PackedInfo,
    g_idx: Tensor,  # (K,) int
) -> OrderFacts:
    """The order of the columns of one linear."""
    low, high = (int(value) for value in torch.aminmax(g_idx))
    trivial = trivial_g_idx(info)
    is_trivial = torch.equal(g_idx.to(torch.int32), trivial)
    even, size = False, max(1, int((g_idx == 0).sum()))
    runs = torch.equal(g_idx.long(), torch.arange(len(g_idx)) // size)
    if low >= 0 and high < info.groups:
        counts = torch.bincount(g_idx.long(), minlength=info.groups)
        even = torch.equal(counts, torch.bincount(trivial.long(), minlength=info.groups))
    return OrderFacts(
        lowest=low,
        highest=high,
        groups=info.groups,
        trivial=is_trivial,
        even=even,
        of_columns=size if runs and not is_trivial else None,
    )
