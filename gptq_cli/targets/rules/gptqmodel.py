"""Rules about GPTQModel 7.7, which reads everything that it writes, and so nearly all that there is."""

from __future__ import annotations

from collections.abc import Iterator

from gptq_cli.placement.names import leaf
from gptq_cli.rules import Remark, rule
from gptq_cli.targets.facts import Case

_GATES = ("in_proj_a", "in_proj_b", "in_proj_ba")
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


@rule("warning", topics=("gptqmodel",))
def wrapped_zeros(case: Case) -> Iterator[Remark]:
    """Asymmetric v1 stores zero - 1, which wraps for a zero of 0: adding 1 per word then carries over."""
    if case.asymmetric and case.facts.checkpoint_format == "gptq":
        yield case.remark(
            "asymmetric codes in format v1: a zero of 0 wraps, and readers disagree about it",
            "write asymmetric codes as gptq_v2",
        )
