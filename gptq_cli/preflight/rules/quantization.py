"""Rules about bits, groups, calibration and dtype: does what was asked for fit this model?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from gptq_cli.config import AUTO_GROUPS
from gptq_cli.model.facts import LinearFact
from gptq_cli.placement.names import fold, parents
from gptq_cli.planning.cases import JobCase, gradient_obstacles
from gptq_cli.preflight.rules.model_files import unsound
from gptq_cli.rules import Remark, rule
from gptq_cli.wording import all_of, names_text, number_of

_SIZES = (*AUTO_GROUPS, 16, 8)
_LOW_SHARE = 0.5
_NAMED = 4
"""Patterns that a hint spells out."""


@rule("error")
def no_linears(case: JobCase) -> list[Remark]:
    """No linear in the decoder blocks can be quantized, so the result would be a copy of the model."""
    if case.facts.linears or unsound(case):
        return []
    if case.facts.by_module:
        left = "that could be quantized is", "that could be quantized are"
        return [
            Remark(
                subject=case.facts.model,
                message=f"{all_of(len(case.facts.by_module), 'linear', *left)} left dense",
                hint="quantize some of them: a --module that leaves fewer dense, or fewer --bits-per-weight",
            )
        ]
    return [
        Remark(
            subject=case.facts.model,
            message=f"{case.facts.architecture} has no linear in its decoder blocks that could be quantized",
            hint="only linears inside decoder blocks, fused experts among them, can be quantized",
        )
    ]


@rule("error")
def blocks_in_order(case: JobCase) -> list[Remark]:
    """The forward of the model does not run its blocks one after another, each once.

    Blocks are quantized in the order in which the model runs them, and each is finished before the next one
    begins, so that a block sees what the quantized ones before it put out. In a model that runs a block again
    before it has come to the last one, or hands tensors from one to another past their arguments, there is no
    such order. What a forward does is found out on torch's `meta` device, before a weight is read.
    """
    if not case.facts.obstacle:
        return []
    return [
        Remark(
            subject=case.facts.model,
            message=f"the blocks of {case.facts.architecture} cannot be quantized one after another: "
            f"{case.facts.obstacle}",
            hint="leave this model dense",
        )
    ]


@rule("error", topics=("group_size", "modules"))
def group_divides(case: JobCase) -> list[Remark]:
    """The group size does not divide the input columns (K) of every linear.

    A ragged last group has no place in the checkpoint format: readers compute the number of groups as
    K / group_size and refuse, or misread, what does not divide.
    """

    def wrong(linear: LinearFact, group: int) -> bool:
        return bool(linear.in_features % group) and group <= linear.in_features

    return _groups(case, wrong, "does not divide")


@rule("error", topics=("group_size", "modules"))
def group_too_large(case: JobCase) -> list[Remark]:
    """The group size is larger than the input columns (K) of a linear."""
    return _groups(case, lambda linear, group: group > linear.in_features, "is larger than")


def _groups(case: JobCase, wrong: Callable[[LinearFact, int], bool], verb: str) -> list[Remark]:
    """One remark for each group size that is wrong for a linear which has it."""
    config = case.work.quantize
    found: dict[int, list[LinearFact]] = {}
    for linear in case.facts.packed:
        group = config.of_linear(linear.name).group_columns
        if group != -1 and wrong(linear, group):
            found.setdefault(group, []).append(linear)
    return [
        Remark(
            subject=f"--group-size {group}" if group == config.group_columns else f"--module group:{group}",
            message=f"group size {group} {verb} the input columns "
            f"{_values(x.in_features for x in linears)} of {number_of(len(linears), 'linear')}",
            hint=_group_hint(case, group, linears),
            modules=tuple(x.name for x in linears),
        )
        for group, linears in found.items()
    ]


def _group_hint(case: JobCase, group: int, wrong: list[LinearFact]) -> str:
    config = case.work.quantize
    if group != config.group_columns:
        common = math.gcd(*(x.in_features for x in wrong))
        fitting = [size for size in _SIZES if common % size == 0]
        listed = ", ".join(map(str, fitting)) or "none of the usual sizes"
        return f"{listed} divide them; -1: one group per row"
    return group_size_hint(math.gcd(*(x.in_features for x in case.facts.packed)))


def group_size_hint(common: int) -> str:
    """Sizes that divide all input columns, whose greatest common divisor is `common`."""
    fitting = [size for size in _SIZES if size <= common and common % size == 0]
    if not fitting:
        return "--group-size -1 (one group per row; no usual size divides all)"
    listed = ", ".join(str(size) for size in fitting)
    return f"--group-size {fitting[0]} ({listed} divide all; -1: one group per row)"


@rule("error", topics=("bits", "modules"))
def packing_rows(case: JobCase) -> list[Remark]:
    """The codes of a column do not fill 32-bit words: K · bits is not a multiple of 32."""
    return _packing(case, "input columns", lambda x: x.in_features)


@rule("error", topics=("bits", "modules"))
def packing_columns(case: JobCase) -> list[Remark]:
    """The zero points of a group do not fill 32-bit words: N · bits is not a multiple of 32."""
    return _packing(case, "output rows", lambda x: x.out_features)


def _packing(case: JobCase, what: str, side: Callable[[LinearFact], int]) -> list[Remark]:
    """One remark for each bit width that does not pack a linear which has it."""
    config = case.work.quantize
    found: dict[int, list[LinearFact]] = {}
    for linear in case.facts.packed:
        bits = config.of_linear(linear.name).bits
        if side(linear) * bits % 32:
            found.setdefault(bits, []).append(linear)
    return [
        Remark(
            subject=f"--bits {bits}" if bits == config.bits else f"--module bits:{bits}",
            message=f"{bits}-bit codes fill 32-bit words only where the {what} are a multiple of "
            f"{32 // math.gcd(32, bits)}; found {_values(map(side, wrong))} in "
            f"{number_of(len(wrong), 'linear')}",
            hint=_packing_hint(case, bits, wrong),
            modules=tuple(x.name for x in wrong),
        )
        for bits, wrong in found.items()
    ]


def _packing_hint(case: JobCase, bits: int, wrong: list[LinearFact]) -> str:
    """Another bit width, or dense by name: for all where all are wrong."""
    dims = [size for x in case.facts.packed for size in (x.in_features, x.out_features)]
    others = [b for b in (8, 4, 2) if b != bits and all(size * b % 32 == 0 for size in dims)]
    if others:
        return f"--bits {others[0]}"
    names = list(dict.fromkeys(fold(x.name) for x in wrong))
    if len(wrong) == len(case.facts.packed) or len(names) > _NAMED:
        return "no bit width packs these sizes; leave this model dense"
    return "no bit width packs them: " + " ".join(f"--module '{name}=dense'" for name in names)


def _values(numbers: Iterable[int]) -> str:
    return names_text(str(number) for number in sorted(set(numbers)))


@rule("error")
def seq_len_positions(case: JobCase) -> list[Remark]:
    """The calibration windows are longer than the positions that the model knows."""
    known, asked = case.facts.max_positions, case.work.calibration.seq_len
    if known is None or asked <= known:
        return []
    return [
        Remark(
            subject=f"--seq-len {asked}",
            message=f"windows of {asked} tokens do not fit a model of {known} positions",
            hint=f"--seq-len {known}",
        )
    ]


@rule("warning")
def calibration_rank(case: JobCase) -> list[Remark]:
    """There are fewer calibration tokens than input columns in the widest linear.

    A Hessian made of T tokens has at most rank T; with fewer tokens than columns only damping
    makes it invertible.
    """
    if not case.facts.linears:
        return []
    data = case.work.calibration
    tokens = data.samples * data.seq_len
    widest = max(case.facts.linears, key=lambda x: x.in_features)
    if tokens >= widest.in_features:
        return []
    needed = -(-widest.in_features // data.seq_len)
    return [
        Remark(
            subject=f"--samples {data.samples}",
            message=f"{tokens} calibration tokens are fewer than the {widest.in_features} input columns of "
            f"{widest.name}: its Hessian is singular without damping",
            hint=f"--samples {max(128, needed)}",
            modules=(widest.name,),
        )
    ]


@rule("warning")
def fused_experts(case: JobCase) -> list[Remark]:
    """Matrices that are fused into three-dimensional parameters stay dense.

    Transformers 5 keeps all experts of a block in such parameters. They are quantized expert by expert where
    the model's own code multiplies with one matrix at a time; this names the ones that are not, and why.
    """
    if unsound(case):
        return []
    sizes = {tensor.name: tensor for tensor in case.facts.tensors}
    reasons: dict[str, list[str]] = {}
    for stack in case.facts.fused:
        reasons.setdefault(stack.reason, []).append(stack.name)
    remarks = []
    for reason, names in reasons.items():
        share = sum(sizes[name].elements for name in names if name in sizes) / max(1, case.facts.parameters)
        remarks.append(
            Remark(
                subject=names_text(dict.fromkeys(name.rpartition(".")[2] for name in names)),
                message=f"{number_of(len(names), 'tensor')} of three dimensions "
                f"{'stays' if len(names) == 1 else 'stay'} dense, {share:.0%} of parameters: "
                f"{reason}",
                hint="the result is larger than the bit width suggests",
                modules=tuple(names),
                size_bytes=sum(sizes[name].size_bytes for name in names if name in sizes),
            )
        )
    return remarks


@rule("note")
def experts_own_target(case: JobCase) -> list[Remark]:
    """Routed linears (experts) are solved for their own output, whatever `--solve-for` says.

    Solving for the dense model compares what both models put into a linear, token by token. The two models
    may send a token to different experts, and then there is nothing to compare. A block with routed linears
    also runs its forwards again for every batch of experts, instead of keeping them parked.
    """
    routed = [x.name for x in case.facts.linears if x.routed]
    if not routed or case.work.quantize.solve_for != "dense":
        return []
    solved = "(an expert) is solved for its", "(experts) are solved for their"
    return [
        Remark(
            subject=f"--solve-for {case.work.quantize.solve_for}",
            message=f"{number_of(len(routed), 'routed linear', *solved)} own output, the other "
            f"{len(case.facts.linears) - len(routed):,} for the dense model's",
            modules=tuple(routed),
        )
    ]


@rule("error", topics=("tune_epochs",))
def tuning_possible(case: JobCase) -> list[Remark]:
    """The model is to be tuned, and cannot be gone back through block by block, or there is too little text.

    Tuning takes gradients through one block at a time, each by itself, and decodes a block's linears from
    their codes. That leaves out models whose own code runs between the blocks, weights that several blocks
    share, and a quantized head. One sample at least is held out and decides, so two are the fewest.
    """
    facts, samples = case.facts, case.work.paired_samples
    reasons = {  # and what else could be done than not to tune
        "the model's own code runs between its blocks": (bool(facts.between), ""),
        "blocks share weights": (bool(facts.shared), ""),
        "its head is to be quantized": (facts.head is not None, ", or leave --quantize-head out"),
        "one sample is held out, and none is left to tune on": (samples < 2, "; or --samples 2"),
    }
    found = {words: other for words, (holds, other) in reasons.items() if holds}
    if not case.work.quantize.tune_epochs or not found:
        return []
    return [
        Remark(
            subject=f"--tune-epochs {case.work.quantize.tune_epochs}",
            message=f"{facts.architecture} cannot be tuned: {', and '.join(found)}",
            hint="--tune-epochs 0" + ("".join(found.values()) if len(found) == 1 else ""),
        )
    ]


@rule("warning", topics=("fisher_tokens",))
def gradients_possible(case: JobCase) -> list[Remark]:
    """Errors are to be weighed by the dense model's gradients, and these cannot be taken.

    Gradients are taken by one process, through one block at a time, each by itself. That leaves out models
    whose own code runs between the blocks, and weights that several blocks share. Then the rows of a linear
    are solved apart, as the other recipes do.
    """
    found = gradient_obstacles(case.facts, case.work.ranks)
    if not case.fisher_tokens or not found:
        return []
    return [
        Remark(
            subject=f"--fisher-tokens {case.fisher_tokens}",
            message=f"gradients of {case.facts.architecture} cannot be taken: {', and '.join(found)}; "
            "the rows of a linear are solved apart",
            hint="--fisher-tokens 0",
        )
    ]


@rule("warning", "note")
def left_dense(case: JobCase) -> list[Remark]:
    """What stays dense: embeddings, head, norms, routers, towers for images or sound, layers for multi-token
    prediction, and all else that is not a linear in a block.

    Nothing is said of a model whose own files are refused: its numbers would stand beside the error, and mean
    nothing.
    """
    total = case.facts.parameters
    if not total or not case.facts.linears or unsound(case):
        return []
    share = 1 - case.facts.quantized_share
    replaced = case.facts.linears if case.facts.head_is_tied else case.facts.packed
    names, parts = {x.name for x in replaced}, {x.part_of for x in replaced}
    dense = [
        t
        for t in case.facts.tensors
        if not t.buffer and t.name not in parts and t.name.rpartition(".")[0] not in names
    ]
    folded = {part.name: part.parameters for part in case.facts.beside}
    for tensor in dense:
        if not any(above in folded for above in parents(tensor.name)):
            name = fold(tensor.name)
            folded[name] = folded.get(name, 0) + tensor.elements
    largest = [name for name in sorted(folded, key=lambda n: -folded[n])[:3] if folded[name] >= total / 100]
    listed = ", ".join(f"{name} {folded[name] / total:.0%}" for name in largest)
    low = 1 - share < _LOW_SHARE and not case.facts.fused
    return [
        Remark(
            level="warning" if low else "note",
            subject=case.facts.model,
            message=f"{share:.0%} of the parameters stay dense{': ' if listed else ''}{listed}",
            hint="the size shrinks little; a larger model of the same family gains more" if low else "",
            size_bytes=sum(t.size_bytes for t in dense),
        )
    ]


@rule("warning")
def half_on_cpu(case: JobCase) -> list[Remark]:
    """The model runs in float16 on the CPU, where half precision is emulated and overflows more easily."""
    if (
        case.facts.dtype != "float16"
        or any(device.is_accelerator for device in case.devices)
        or not case.devices
    ):
        return []
    return [
        Remark(
            subject="--dtype float16",
            message="float16 on the cpu is slow and overflows above 65504",
            hint="--dtype bfloat16; or --dtype float32 (where memory allows)",
        )
    ]


@rule("warning")
def bfloat16_support(case: JobCase) -> list[Remark]:
    """The model runs in bfloat16 on a card that does not compute it (below compute capability 8)."""
    if case.facts.dtype != "bfloat16":
        return []
    return [
        Remark(
            subject=str(one.device),
            message=f"{one.device} ({one.name}) has no bfloat16 arithmetic; it is emulated, slowly",
            hint="--dtype float16",
        )
        for one in case.capabilities
        if not one.bfloat16
    ]
