"""Rules about settings by module, about the head, and about what stays dense by itself"""

from __future__ import annotations

import difflib
import re

from gptq_cli.model.config_types import COMPARE
from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device_rules import NameTree
from gptq_cli.placement.names import fold, parents
from gptq_cli.planning.cases import JobCase
from gptq_cli.planning.memory import packed_bytes
from gptq_cli.preflight.rules.model_files import unsound
from gptq_cli.results.kept import TOO_SMALL
from gptq_cli.rules import Remark, rule
from gptq_cli.wording import names_text, number_of

_LOUD_SHARE = 0.01
_FUSING: tuple[str, ...] = ("vllm", "sglang")


@rule("error", topics=("modules",))
def module_pattern(case: JobCase) -> list[Remark]:
    """A pattern of --module covers no linear, or none that can be quantized.

    A setting that is ignored would leave a checkpoint other than the one that was asked for. `dense` may name
    whatever stays dense anyway, such as routers and norms.
    """
    facts = case.facts
    packed = [linear.name for linear in (*facts.packed, *facts.by_module)]
    able, dense, modules = NameTree(packed), NameTree(facts.dense_linears), NameTree(facts.modules)
    found = []
    for one in case.work.quantize.modules:
        there = modules.covered_by(one.pattern)
        if able.covered_by(one.pattern) or (one.dense and (there or dense.covered_by(one.pattern))):
            continue
        if dense.covered_by(one.pattern):
            tree = {kept.name: kept.reason for kept in facts.kept}
            reasons = {tree[k] for k in tree if NameTree(fold(k).split(", ")).covered_by(fold(one.pattern))}
            why = f": {names_text(sorted(reasons))}" if reasons else ""
            message, hint = f"what it covers cannot be quantized{why}", "leave it out, or say dense"
        elif there and not _names_head(one.pattern):
            message, hint = (
                "what it covers is not a linear, and stays dense as it is",
                _near(one.pattern, packed, facts),
            )
        else:
            message, hint = (
                "it covers no linear of this model",
                _near(one.pattern, packed, facts),
            )
        found.append(Remark(subject=f"--module {one}", message=message, hint=hint))
    return found


def _names_head(pattern: str) -> bool:
    return re.fullmatch(r"(.*\.)?(lm_head|embed_out|output)", pattern) is not None


def _near(pattern: str, packed: list[str], facts: ModelFacts) -> str:
    """Names like `pattern`: of linears, and of what lies above them."""
    if _names_head(pattern) and facts.head is not None:
        return f"here the output head is called {facts.head.name}"
    if _names_head(pattern):
        return "the output head is quantized with --quantize-head"
    names = dict.fromkeys(fold(name) for name in (*packed, *facts.dense_linears))
    above = dict.fromkeys(parent for name in names for parent in parents(name))
    asked = re.sub(r"(?<![^.])\d+(-\d+)?(?![^.])", "*", pattern)
    near = difflib.get_close_matches(asked, [*names, *above], n=3, cutoff=0.5)
    return f"did you mean {names_text(near)}?" if near else f"linears here: {names_text(names, 7)}"


@rule("error", "warning", topics=("modules",))
def siblings_alike(case: JobCase) -> list[Remark]:
    """Linears that servers load as one matrix have different settings, or some of them are dense.

    vLLM and SGLang put the linears that read one input and stand side by side (q, k and v; gate and up; all
    experts of a block) into one tensor with one format, and refuse a checkpoint in which they differ.
    """
    config = case.work.quantize
    if not config.modules:
        return []
    groups: dict[tuple[str, str], dict[str, object]] = {}
    for linear in (*case.facts.linears, *case.facts.by_module):
        own = config.of_linear(linear.name)
        dense = linear in case.facts.by_module
        treated: object = "dense" if dense else (own.bits, own.group_columns, own.sym)
        groups.setdefault(linear.fused_with, {})[linear.name] = treated
    split = [list(held) for held in groups.values() if len(set(held.values())) > 1]
    if not split:
        return []
    names = dict.fromkeys(fold(name) for held in split for name in held)
    strict = [target for target in case.targets if target in _FUSING]
    return [
        Remark(
            level="error" if strict else "warning",
            subject="--module",
            message=f"{names_text(names, 8)} read one input, and servers load them as one matrix; "
            "their settings differ",
            hint="give them the same settings, or let a pattern cover what is above them",
            modules=tuple(name for held in split for name in held),
        )
    ]


@rule("error", topics=("quantize_head",))
def quantized_head(case: JobCase) -> list[Remark]:
    """The head is to be quantized, but the model has none that is a linear, or --module leaves it dense.

    Nor can it be where the model's own code runs between the blocks: what enters the head is then known only
    to forwards that end with the last block.
    """
    if not case.work.quantize.quantize_head:
        return []
    if case.facts.head is not None and case.facts.between:
        return [
            Remark(
                subject="--quantize-head",
                message=f"the blocks of {case.facts.architecture} are run by the model's own code "
                f"({case.facts.between}), which ends with the last block",
                hint="leave --quantize-head out",
            )
        ]
    if case.facts.head is not None:
        return []
    return [
        Remark(
            subject="--quantize-head",
            message=f"{case.facts.architecture} has no output head that is a linear, "
            "or --module leaves it dense",
            hint="leave --quantize-head out",
        )
    ]


@rule("note", topics=("quantize_head",))
def head_untied(case: JobCase) -> list[Remark]:
    """The head that is quantized is one tensor with the embedding, which stays dense.

    The checkpoint holds both, and config.json says that they are not tied: a reader that tied them would
    drop the codes.
    """
    head = case.facts.head
    if head is None or not case.facts.head_is_tied:
        return []
    return [
        Remark(
            subject=head.name,
            message="it is the embedding in the source; quantized, it becomes a tensor of its own beside the "
            "dense embedding, and config.json says tie_word_embeddings false: the files grow",
            hint="a head that is read in fewer bytes makes each token faster; for the smallest files, leave "
            "--quantize-head out",
            modules=(head.name,),
            size_bytes=packed_bytes(head, case.work.quantize),
        )
    ]


@rule("warning", "note")
def small_linears(case: JobCase) -> list[Remark]:
    """Linears that cannot be packed stay dense, because they are too small to matter.

    Their codes or zeros do not fill 32-bit words, or the group does not divide their columns, and they have
    fewer than 32 rows or columns, or less than 1 % of their block's weights. Larger ones are an error.
    """
    return [
        Remark(
            level="warning" if one.weights >= _LOUD_SHARE * case.facts.parameters else "note",
            subject=one.name,
            message=f"{number_of(one.linears, 'linear', 'stays', 'stay')} dense: {one.reason} with "
            "these bits and groups",
        )
        for one in case.facts.kept
        if one.reason == TOO_SMALL and not unsound(case)
    ]


@rule("warning")
def surplus_blocks(case: JobCase) -> list[Remark]:
    """The files hold more decoder blocks than config.json says, and the model does not run the others.

    They are copied as they are, and no reader uses them: config.json belongs to another version of the model,
    or its number of layers was changed. Layers for multi-token prediction are no such blocks.
    """
    blocks = [part for part in case.facts.beside if part.surplus]
    if not blocks:
        return []
    names = [part.name for part in blocks]
    return [
        Remark(
            subject=names_text(names),
            message=f"config.json describes {number_of(len(case.facts.blocks), 'block')}, and the files hold "
            f"{len(names)} more, which the model does not run: "
            f"{'it is' if len(names) == 1 else 'they are'} copied dense",
            hint=COMPARE,
            modules=tuple(names),
        )
    ]
