"""Rules about a budget of bits: can it be kept, and can be measured what fewer bits cost?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptq_cli.placement.device import format_size
from gptq_cli.planning.cases import DeviceNeed
from gptq_cli.rules import Remark, rule


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsCase:
    """A budget of bits asked of a model."""

    asked: float
    """Bits per parameter of the whole checkpoint."""
    parameters: int
    least_bytes: int
    """The smallest file of all choices."""
    most_bytes: int | None
    """The file with everything dense; None where a target, or a setting by module, does not let it be."""
    dense_bytes: int
    """Tensors that no choice makes smaller: embeddings, norms, what is dense by --module."""
    targets: tuple[str, ...]
    architecture: str
    between: str = ""
    """Why the model's own forward has to run between the blocks; "" where it has not."""
    head: bool = True
    """The model has an output head that is a linear."""


@rule("error", topics=("bits_per_weight",))
def bits_reachable(case: BitsCase) -> list[Remark]:
    """No choice of bits makes a file of at most --bits-per-weight, or everything could stay dense.

    The budget counts the whole checkpoint: embeddings and all that stays dense have 16 bits in most models,
    and scales, zeros and g_idx take some tenths of a bit. So a small model with a large vocabulary cannot
    come near the bits of its linears.
    """
    least = 8 * case.least_bytes / max(1, case.parameters)
    most = math.inf if case.most_bytes is None else 8 * case.most_bytes / max(1, case.parameters)
    if least <= case.asked < most:
        return []
    kept = f"{8 * case.dense_bytes / max(1, case.parameters):.3f} of them are tensors that stay dense"
    for_targets = f" for {', '.join(case.targets)}" if case.targets else ""
    if case.asked >= most:
        message = f"nothing would have to be quantized: everything dense has {most:.3f}"
        hint = "give less, or --bits 8"
    else:
        message = (
            f"the smallest file has {least:.3f} bits per parameter ({format_size(case.least_bytes)}); {kept}"
        )
        hint = f"--bits-per-weight {_above(least)} or more"
    upper = f" to {_below(most)}" if case.most_bytes is not None else " or more"
    allowed = f"allowed{for_targets}: {_above(least)}{upper}"
    return [Remark(subject=f"--bits-per-weight {case.asked:g}", message=f"{message}; {allowed}", hint=hint)]


@rule("error", topics=("bits_per_weight",))
def bits_measurable(case: BitsCase) -> list[Remark]:
    """What fewer bits cost cannot be measured: the flow from block to block is not direct, or there is no
    head.

    The measurement runs every block once, on many streams of hidden states side by side, and compares the
    predictions at the end. Where the model's own code has to run between the blocks, that is not possible.
    """
    if case.between:
        why = f"the blocks of {case.architecture} are run by the model's own code ({case.between})"
    elif not case.head:
        why = f"{case.architecture} has no output head that is a linear"
    else:
        return []
    return [
        Remark(
            subject=f"--bits-per-weight {case.asked:g}",
            message=f"what fewer bits cost cannot be measured: {why}",
            hint="--bits 4, and --module 'PATTERN=bits:8' for what needs more",
        )
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuringCase:
    """What fewer bits cost is to be measured, and is not kept from an earlier run."""

    needs: tuple[DeviceNeed, ...]
    """What the devices would have to hold."""


@rule("error")
def bits_memory(case: MeasuringCase) -> list[Remark]:
    """There is no memory to measure what fewer bits cost.

    Beside one block, the embedding and the head are in memory, and the hidden states of some windows for
    every set of linears.
    """
    return [
        Remark(
            subject=need.device,
            message=f"to measure what fewer bits cost, {need.device} needs "
            f"{format_size(need.needed_bytes)} of {format_size(need.limit_bytes)}",
            hint="measure on a larger machine, where GPTQ_CACHE names a directory that both see; or --bits 4",
        )
        for need in case.needs
        if need.needed_bytes > need.limit_bytes
    ]


def _above(value: float) -> str:
    return f"{-(-value * 1000 // 1) / 1000:.3f}"


def _below(value: float) -> str:
    return f"{value * 1000 // 1 / 1000:.3f}"
