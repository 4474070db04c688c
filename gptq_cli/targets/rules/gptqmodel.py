"""Rules about GPTQModel 7.7, which reads everything that it writes, and so nearly all that there is.

`scripts/interop_models.py` tries them, with release 7.6.
"""

from __future__ import annotations

from collections.abc import Iterator

from gptq_cli.placement.names import leaf
from gptq_cli.rules import Remark, rule
from gptq_cli.targets.facts import Case

_GATES = ("in_proj_a", "in_proj_b", "in_proj_ba")
_EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")
_ANOTHER = "serve it with another reader, or leave the experts dense"
GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)


@rule("error", topics=("gptqmodel",))
def gptqmodel_groups(case: Case) -> Iterator[Remark]:
    """GPTQModel checks the group size against a list."""
    odd = [group for group in case.groups if group not in GROUPS]
    if odd:
        message = f"group size {odd[0]}; allowed: {', '.join(map(str, GROUPS))}"
        yield case.remark(message, "quantize with --group-size 128, 64 or 32")


@rule("error", topics=("gptqmodel",))
def gates_stay_dense(case: Case) -> Iterator[Remark]:
    """GPTQModel reads the gates of Gated DeltaNet dense, and leaves packed ones without values.

    These are in_proj_a and in_proj_b of Qwen3.5, and in_proj_ba of Qwen3-Next; the official releases have
    them dense, too.
    """
    packed = [x for x in case.facts.linears if leaf(x.name) in _GATES]
    if packed:
        message = "GPTQModel expects these gates dense, and fills packed ones with nothing"
        yield case.remark(message, "leave them dense", packed)


@rule("error", topics=("gptqmodel",))
def defused_experts(case: Case) -> Iterator[Remark]:
    """GPTQModel cuts fused experts into halves, and calls them gate_proj and up_proj.

    It takes them from files under these names alone (its release 7.6 does not find w1, w2 and w3, as files
    of Mixtral have them). Where the rows of both alternate, as in gpt-oss, its halves hold rows of both: it
    reads its own files, but computes something else from the gate_proj and up_proj that others read.
    """
    other = {x: leaf(x.source_name or x.name) for x in case.experts}
    other = {x: name for x, name in other.items() if name not in _EXPERT_LINEARS}
    if other:
        called = ", ".join(dict.fromkeys("N" if name.isdecimal() else name for name in other.values()))
        message = f"experts are called {called} in the files; GPTQModel finds {', '.join(_EXPERT_LINEARS)}"
        yield case.remark(message, _ANOTHER, tuple(other))
    mixed = [x for x in case.experts if x.interleaved]
    if mixed:
        message = "GPTQModel reads rows of gate and up that alternate as if they followed one another"
        yield case.remark(message, _ANOTHER, mixed)


@rule("warning", topics=("gptqmodel",))
def wrapped_zeros(case: Case) -> Iterator[Remark]:
    """Asymmetric v1 stores zero - 1, which wraps for a zero of 0: adding 1 per word then carries over."""
    if case.asymmetric and case.facts.checkpoint_format == "gptq":
        yield case.remark(
            "asymmetric codes in format v1: a zero of 0 wraps, and readers disagree about it",
            "write asymmetric codes as gptq_v2",
        )
