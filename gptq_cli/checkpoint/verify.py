"""Every tensor of a checkpoint judged; the answer is findings, nothing is raised for what is wrong inside.

Names, shapes and dtypes are checked by `checkpoint.open` from the headers of the files. What needs values
is checked here, one linear at a time: scales, g_idx, the convention of the zeros, blank codes, dense
tensors. Like findings are put together, so that 210 linears with negative scales are one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptq_cli.checkpoint.checkpoint import PackedInfo, QuantizedCheckpoint, trivial_g_idx
from gptq_cli.checkpoint.format import PARTS, WORDS
from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.checkpoint.zeros import read_zeros
from gptq_cli.config import Target
from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.errors import CheckpointError, ModelError
from gptq_cli.findings import Finding, Level
from gptq_cli.model.blocks import find_linears, shape
from gptq_cli.model.conversion import tied_groups
from gptq_cli.model.facts import dtype_name
from gptq_cli.model.streamed import StreamedReader
from gptq_cli.results.load import RuleResult, TargetReport, VerifyReport
from gptq_cli.targets.check import TargetFacts, TargetLinear, target_report
from gptq_cli.wording import names_text

OnTensor = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""

_CHECKS = {
    "files": "heads, sizes, shard index, config, shapes and dtypes agree",
    "names": "every tensor has a place in the model",
    "coverage": "every linear in the blocks is quantized, or declared dense",
    "codes": "no qweight is blank",
    "zeros": "zeros follow the format's convention",
    "scales": "scales are finite, float16 and not 0",
    "g-idx": "g_idx is in range and in the order that desc_act says",
    "dense": "dense tensors are finite, and tied ones are one",
}
"""Part of a checkpoint -> what is looked at there, in the order of the report."""
_HINTS = {
    "g-idx-order": "servers that skip g_idx compute something else: say desc_act = true in the config",
    "zeros-convention": "set checkpoint_format to what the zeros are: gptq stores zero - 1, gptq_v2 the zero",
    "zeros-differ": "set sym = false in the config: readers of symmetric codes do not look at the zeros",
    "dense-tied": "set tie_word_embeddings = false in config.json, or take the tensor out",
    "scales-dtype": "float16 is what every reader takes",
}


@dataclass(frozen=True, slots=True)
class _Remark:
    """Something about one tensor or linear; equal (rule, level, message) are put together."""

    rule: str
    level: Level
    message: str
    subject: str


def verify_checkpoint(
    path: str | Path,
    *,
    targets: tuple[Target, ...] = (),
    trust_remote_code: bool = False,
    on_tensor: OnTensor = lambda done, total: None,
) -> VerifyReport:
    """Judge every tensor of the checkpoint in `path`, and whether the readers `targets` take it."""
    try:
        checkpoint = open_checkpoint(path, trust_remote_code=trust_remote_code)
    except (CheckpointError, ModelError) as error:
        if is_out_of_memory(error):
            raise
        return _unreadable(path, error)
    remarks = list(_structure(checkpoint))
    with checkpoint.reader() as reader:
        remarks += _values(checkpoint, reader, on_tensor)
        remarks += _ties(checkpoint, reader)
    findings = _together(remarks)
    ordered = any(finding.rule == "g-idx-order" for finding in findings)
    packed = (*checkpoint.linears, *checkpoint.experts)
    return VerifyReport(
        path=str(path),
        checks=_checks(findings),
        targets=_target_reports(targets, target_facts(checkpoint, trivial_g_idx=not ordered)),
        tensors=len(checkpoint.tensors),
        linears=len(packed),
        size_bytes=checkpoint.packed_bytes,
        coverage=_coverage(checkpoint),
    )


def check_targets(
    path: str | Path, targets: tuple[Target, ...], *, trust_remote_code: bool = False
) -> VerifyReport:
    """Whether the readers `targets` take the checkpoint, by its settings, its heads and g_idx alone."""
    try:
        checkpoint = open_checkpoint(path, trust_remote_code=trust_remote_code)
    except (CheckpointError, ModelError) as error:
        if is_out_of_memory(error):
            raise
        return _unreadable(path, error)
    packed = (*checkpoint.linears, *checkpoint.experts)
    with checkpoint.reader() as reader:
        ordered = any(
            rule == "g-idx-order"
            for info in packed
            if info.has_g_idx
            for rule, _, _ in _check_order(info, reader.get(f"{info.source_name}.g_idx"))
        )
    return VerifyReport(
        path=str(path),
        checks=(RuleResult("files", _CHECKS["files"], ()),),
        targets=_target_reports(targets, target_facts(checkpoint, trivial_g_idx=not ordered)),
        tensors=len(checkpoint.tensors),
        linears=len(packed),
        size_bytes=checkpoint.packed_bytes,
        coverage=_coverage(checkpoint),
    )


def _unreadable(path: str | Path, error: CheckpointError | ModelError) -> VerifyReport:
    problems = getattr(error, "problems", (error.message,))
    findings = tuple(
        Finding(rule="unreadable", level="error", subject=str(path), message=text, hint=error.hint or "")
        for text in problems
    )
    return VerifyReport(path=str(path), checks=(RuleResult("files", _CHECKS["files"], findings),))


def _target_reports(targets: tuple[Target, ...], facts: TargetFacts) -> tuple[TargetReport, ...]:
    return tuple(target_report(target, facts) for target in dict.fromkeys(targets))


def _checks(findings: tuple[Finding, ...]) -> tuple[RuleResult, ...]:
    """The findings, sorted to the parts of the checkpoint that they are about."""
    return tuple(
        RuleResult(part, about, tuple(f for f in findings if _part_of(f.rule) == part))
        for part, about in _CHECKS.items()
    )


def _part_of(rule: str) -> str:
    for prefix in ("scales", "g-idx", "zeros", "codes", "dense", "coverage"):
        if rule.startswith(f"{prefix}-") or rule == prefix:
            return prefix
    return "names" if rule == "leftover" else "files"


def target_facts(checkpoint: QuantizedCheckpoint, *, trivial_g_idx: bool = True) -> TargetFacts:
    """The facts that target rules ask about, of an opened checkpoint."""
    form = checkpoint.format
    packed = (*checkpoint.linears, *checkpoint.experts)
    scales = {t.dtype for t in checkpoint.tensors if t.name.endswith(".scales")}
    settings = {(info.format.bits, info.format.group_size, info.format.sym) for info in packed}
    head = checkpoint.model.get_output_embeddings()
    names = {id(module): name for name, module in checkpoint.model.named_modules()}
    return TargetFacts(
        bits=form.base.bits,
        group_size=form.base.group_size,
        sym=form.base.sym and all(info.format.sym for info in packed),
        desc_act=form.base.desc_act,
        checkpoint_format=form.base.checkpoint_format,
        dtype=dtype_name(checkpoint.dtype),
        linears=tuple(
            TargetLinear(
                name=info.source_name,
                in_features=info.in_features,
                out_features=info.out_features,
                bits=info.format.bits,
                group_size=info.format.group_size,
            )
            for info in packed
        ),
        scale_dtype=min(scales - {"float16"}, default="float16"),
        lm_head=names.get(id(head)) in {info.name for info in checkpoint.linears},
        changed=len(settings) > 1,
        left_dense=any(fields is None for _, fields in form.overrides),
        modules_listed=bool(checkpoint.config_dict.get("modules_in_block_to_quantize")),
        trivial_g_idx=trivial_g_idx,
        in_config_json=_says_config_json(checkpoint.directory),
    )


def _says_config_json(directory: Path) -> bool:
    path = directory / "config.json"
    return path.is_file() and '"quantization_config"' in path.read_text(encoding="utf-8", errors="replace")


def _structure(checkpoint: QuantizedCheckpoint) -> Iterator[_Remark]:
    """What the heads and the config say."""
    for note in checkpoint.notes:
        yield _Remark("reading", "note", note, str(checkpoint.directory))
    for problem in checkpoint.files.problems:
        yield _Remark(problem.kind, "warning", problem.message, problem.subject)
    for name in checkpoint.keys.unexpected:
        yield _Remark("leftover", "warning", "the model has no place for the tensor", name)
    if not (checkpoint.directory / "quantize_config.json").is_file():
        yield _Remark("config-copy", "note", "there is no quantize_config.json", str(checkpoint.directory))
    listed = _listed_modules(checkpoint)
    for name, _ in _dense_linears(checkpoint):
        declared = checkpoint.format.of(name) is None or (
            bool(listed) and not any(name.endswith(f".{item}") for item in listed)
        )
        if declared:
            yield _Remark("coverage", "note", "the linear is dense, as the config says", name)
        else:
            message = "the linear is dense, which the config does not say: readers look for packed tensors"
            yield _Remark("coverage", "warning", message, name)


def _listed_modules(checkpoint: QuantizedCheckpoint) -> tuple[str, ...]:
    groups = checkpoint.config_dict.get("modules_in_block_to_quantize")
    if not isinstance(groups, list):
        return ()
    return tuple(str(name) for group in groups if isinstance(group, list) for name in group)


def _dense_linears(checkpoint: QuantizedCheckpoint) -> Iterator[tuple[str, int]]:
    """(name, weights) of the linears in the blocks that are not packed."""
    packed = {info.name for info in checkpoint.linears}
    for block in checkpoint.blocks:
        for name, linear in find_linears(checkpoint.model.get_submodule(block)).items():
            if f"{block}.{name}" not in packed:
                rows, columns = shape(linear)
                yield f"{block}.{name}", rows * columns


def _coverage(checkpoint: QuantizedCheckpoint) -> float:
    packed = sum(x.in_features * x.out_features for x in (*checkpoint.linears, *checkpoint.experts))
    dense = sum(size for _, size in _dense_linears(checkpoint))
    return packed / max(1, packed + dense)


def _values(
    checkpoint: QuantizedCheckpoint, reader: StreamedReader, on_tensor: OnTensor
) -> Iterator[_Remark]:
    done, total = 0, len(checkpoint.tensors)
    packed_names: set[str] = set()
    for info in (*checkpoint.linears, *checkpoint.experts):
        tensors = {
            part: reader.get(f"{info.source_name}.{part}")
            for part in PARTS
            if f"{info.source_name}.{part}" in reader
        }
        yield from check_linear(info, tensors)
        packed_names |= {f"{info.source_name}.{part}" for part in tensors}
        done += len(tensors)
        on_tensor(done, total)
    for tensor in checkpoint.tensors:
        if tensor.name in packed_names:
            continue
        values = reader.get(tensor.name)
        if values.is_floating_point() and values.element_size() > 1 and not _finite(values):
            yield _Remark("dense-finite", "error", "the tensor holds values that are not finite", tensor.name)
        done += 1
        on_tensor(done, total)


def _ties(checkpoint: QuantizedCheckpoint, reader: StreamedReader) -> Iterator[_Remark]:
    """Tensors that the config ties and the files hold twice."""
    for names in tied_groups(checkpoint.model):
        held = [source for name in names if (source := checkpoint.keys.source_of(name)) in reader and source]
        for other in held[1:]:
            if not torch.equal(reader.get(held[0]), reader.get(other)):
                message = f"the config ties it to {held[0]}, but the files hold another tensor for it"
                yield _Remark("dense-tied", "warning", message, other)


def _finite(values: Tensor) -> bool:
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def check_linear(info: PackedInfo, tensors: dict[str, Tensor]) -> Iterator[_Remark]:
    """What the values of one packed linear say; shapes and dtypes are right already."""

    def remark(rule: str, level: Level, message: str) -> _Remark:
        return _Remark(rule, level, message, info.source_name)

    scales = tensors["scales"]
    if not _finite(scales):
        yield remark("scales-finite", "error", "scales hold values that are not finite")
    else:
        if bool((scales == 0).any()):
            yield remark("scales-zero", "warning", "some scales are 0: their groups have no weights at all")
        if bool((scales < 0).any()):
            yield remark("scales-negative", "note", "some scales are negative, which every reader here takes")
    if scales.dtype != torch.float16:
        name = dtype_name(scales.dtype)
        yield remark("scales-dtype", "warning", f"scales are stored as {name}")
    if tensors["qweight"].numel() > 1 and bool((tensors["qweight"] == tensors["qweight"][0, 0]).all()):
        yield remark("codes-constant", "warning", "all words of qweight are the same: the file may be blank")
    yield from (remark(*item) for item in _check_order(info, tensors.get("g_idx")))
    yield from (remark(*item) for item in _check_zeros(info, tensors["qzeros"]))


def _check_order(info: PackedInfo, g_idx: Tensor | None) -> Iterator[tuple[str, Level, str]]:
    if g_idx is None:
        return
    low, high = (int(value) for value in torch.aminmax(g_idx))
    if low < 0 or high >= info.groups:
        worst = low if low < 0 else high
        yield "g-idx-range", "error", f"g_idx holds group {worst}; allowed: 0 to {info.groups - 1}"
        return
    if high == 0 and info.groups > 1:
        yield "g-idx-zero", "note", "g_idx is all 0, which is read as no order at all"
        return
    trivial = trivial_g_idx(info)
    if torch.equal(g_idx.to(torch.int32), trivial):
        return
    if not info.format.desc_act:
        yield "g-idx-order", "warning", "g_idx orders the columns though desc_act is false"
    counts = torch.bincount(g_idx.long(), minlength=info.groups)
    if not torch.equal(counts, torch.bincount(trivial.long(), minlength=info.groups)):
        yield "g-idx-uneven", "warning", "g_idx gives the groups different numbers of columns"


def _check_zeros(info: PackedInfo, qzeros: Tensor) -> Iterator[tuple[str, Level, str]]:
    form = info.format
    zeros = read_zeros(qzeros, form, info.out_features)
    middle, top = 1 << (form.bits - 1), (1 << form.bits) - 1
    if not zeros.known:
        yield "zeros-differ", "error", "zeros differ from the middle code though sym is true"
    elif form.sym and zeros.stored == WORDS != form.zeros:
        yield "zeros-convention", "error", "zeros are stored as GPTQModel before 7.0 does it with 3 bits"
    elif form.sym and zeros.stored != form.zeros:
        found, expected = (middle, middle - 1) if zeros.stored == "gptq_v2" else (middle - 1, middle)
        yield (
            "zeros-convention",
            "error",
            f"all stored zeros are {found}, but symmetric {form.checkpoint_format} has {expected}",
        )
    elif not form.sym and zeros.stored == WORDS and bool((zeros.values == 0).any()):
        yield (
            "zeros-wrapped",
            "warning",
            "some zeros are 0, subtracted from whole words: readers that go field by field read others there",
        )
    elif not form.sym and zeros.stored == "gptq" and bool((zeros.values == 0).any()):
        yield (
            "zeros-wrapped",
            "warning",
            f"some zeros are stored as {top}: read as 0 or as {top + 1}",
        )


def _together(remarks: list[_Remark]) -> tuple[Finding, ...]:
    groups: dict[tuple[str, Level, str], list[str]] = {}
    for remark in remarks:
        groups.setdefault((remark.rule, remark.level, remark.message), []).append(remark.subject)
    return tuple(
        Finding(
            rule=rule,
            level=level,
            subject=names_text(subjects, 1),
            message=message,
            hint=_HINTS.get(rule, ""),
            modules=tuple(subjects),
        )
        for (rule, level, message), subjects in groups.items()
    )
