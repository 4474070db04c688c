"""Rules about tensor parallelism, `--tp N`: will the shards of every matrix divide over N ranks?

Both servers deal out heads, and divide the other matrices evenly: those that read the residual stream by
columns (N), those that write into it by rows (K). A rank needs whole groups of rows, and SGLang a multiple of
64 columns of each fused matrix. Key-value heads are copied where there are fewer of them than ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gptq_cli.placement.names import leaf
from gptq_cli.readers import MAX_RANKS
from gptq_cli.rules import Remark, rule
from gptq_cli.targets.facts import Case, FusedMatrix, TargetLinear
from gptq_cli.targets.rules.sglang import MIN_COLUMNS
from gptq_cli.wording import and_others, number_of

_SMALLEST_GROUP = 32
"""vLLM's MoeWNA16 halves groups that do not fit a rank, down to this."""
_KEYS = ("k_proj", "v_proj", "key", "value")
_QKV = ("qkv_proj", "query_key_value", "c_attn", "qkv", "Wqkv", "W_pack")


@rule("error", "note", topics=("vllm", "sglang"))
def tensor_parallel(case: Case) -> Iterator[Remark]:
    """With `--tp N`: heads, and the columns or rows of every matrix, divide over N ranks.

    The inputs of the linears that write into the residual stream (o_proj, down_proj) must give each rank
    whole groups: a smaller --group-size is the usual way out. Says how many ranks are possible at most.
    """
    ranks = case.facts.tp
    if ranks == 1:
        return
    shapes = _shapes(case)
    misfits = list(_misfits(case, shapes, ranks))
    most = max((n for n in range(1, MAX_RANKS + 1) if not any(_misfits(case, shapes, n))), default=0)
    if not misfits:
        message = f"divides over {ranks} ranks; {most} {'is' if most == ranks else 'are'} the most that do"
        yield replace(case.remark(message), level="note")
        return
    way = f"at most {most} ranks divide it" if most > 1 else "no number of ranks divides it"
    hint = _way_out(case, shapes, most)
    for about in ([x for x in misfits if not x.linears], [x for x in misfits if x.linears]):
        if about:
            linears = [linear for misfit in about for linear in misfit.linears]
            yield case.remark(f"{about[0].reason}{and_others(about)}; {way}", hint, linears)


_DO = "does", "do"
_PER_RANK = "per rank does", "per rank do"


@dataclass(frozen=True, slots=True)
class _Misfit:
    reason: str
    linears: tuple[TargetLinear, ...] = ()


def _shapes(case: Case) -> list[FusedMatrix]:
    """One matrix of each kind: models have few kinds in many blocks."""
    experts = (FusedMatrix(x.name, (x,)) for x in case.experts)
    kinds: dict[object, FusedMatrix] = {}
    for matrix in (*case.matrices, *experts):
        parts = tuple(
            (leaf(x.name), x.in_features, x.out_features, x.settings, x.split, x.is_expert)
            for x in matrix.linears
        )
        kinds.setdefault(parts, matrix)
    return list(kinds.values())


def _misfits(case: Case, shapes: Sequence[FusedMatrix], ranks: int) -> Iterator[_Misfit]:
    heads = case.facts.heads
    if heads.queries % ranks:
        yield _Misfit(f"{number_of(heads.queries, 'attention head', *_DO)} not divide over {ranks} ranks")
    if heads.keys and heads.keys % ranks and ranks % heads.keys:
        yield _Misfit(
            f"{heads.keys} key-value heads neither divide over {ranks} ranks nor can be copied evenly"
        )
    for label, number in heads.others:
        if number % ranks:
            noun, _, rest = label.partition(" of ")
            does, do = (f"of {rest} {verb}" if rest else verb for verb in _DO)
            what = number_of(number, noun.removesuffix("s"), does, do)
            yield _Misfit(f"{what} not divide over {ranks} ranks")
    for matrix in shapes:
        reason = _reason(case, matrix, ranks)
        if reason:
            yield _Misfit(reason, matrix.linears)


def _reason(case: Case, matrix: FusedMatrix, ranks: int) -> str:
    """Why the shards of a matrix do not divide; "" where they do."""
    columns = 0
    for linear in matrix.linears:
        if linear.split == "row":
            return _row_reason(case, linear, ranks)
        own = _columns(case, linear, ranks) if linear.split == "column" else linear.out_features
        if own is None:
            return f"its {number_of(linear.out_features, 'output', *_DO)} not divide over {ranks} ranks"
        if own * linear.bits % 32:
            return f"{number_of(own, 'output', *_PER_RANK)} not fill whole words of zeros"
        columns += own
    if case.target == "sglang" and columns % MIN_COLUMNS:
        fused = len(matrix.linears) > 1
        what = number_of(columns, "column" if fused else "output")
        what = f"{leaf(matrix.name)} has {what}" if fused else what
        return f"{what} per rank; SGLang takes multiples of {MIN_COLUMNS}"
    return ""


def _row_reason(case: Case, linear: TargetLinear, ranks: int) -> str:
    if linear.in_features % ranks:
        return f"its {number_of(linear.in_features, 'input', *_DO)} not divide over {ranks} ranks"
    own = linear.in_features // ranks
    if own * linear.bits % 32:
        return f"{number_of(own, 'input', *_PER_RANK)} not fill whole words of codes"
    group = linear.group_size
    if linear.is_expert and case.target == "vllm":
        group = min(group, _SMALLEST_GROUP)
    if group != -1 and own % group:
        return f"{own} inputs per rank do not divide into groups of {group}"
    return ""


def _columns(case: Case, linear: TargetLinear, ranks: int) -> int | None:
    """Columns of a linear on one rank; None where they do not divide."""
    heads, last = case.facts.heads, leaf(linear.name)
    if 0 < heads.keys < ranks and ranks % heads.keys == 0 and not linear.is_expert:
        if last in _KEYS and linear.out_features % heads.keys == 0:
            return linear.out_features // heads.keys
        together = heads.queries + 2 * heads.keys
        if last in _QKV and heads.queries % ranks == 0 and linear.out_features % together == 0:
            return linear.out_features // together * (heads.queries // ranks + 2)
    return None if linear.out_features % ranks else linear.out_features // ranks


def _way_out(case: Case, shapes: Sequence[FusedMatrix], most: int) -> str:
    """The largest smaller group with which every shard divides; else the number of ranks that does."""
    ranks = case.facts.tp
    for size in (64, 32):
        smaller = [
            replace(m, linears=tuple(replace(x, group_size=min(x.group_size, size)) for x in m.linears))
            for m in shapes
        ]
        if size < case.facts.group_size and not any(_misfits(case, smaller, ranks)):
            return f"quantize with --group-size {size}" + (f", or use {most} ranks" if most > 1 else "")
    return f"use {most} ranks" if most > 1 else "serve it on one device"
