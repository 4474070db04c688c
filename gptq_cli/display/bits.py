"""How a budget of bits was spent, in words: for the summary, the plan, the page and the card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from gptq_cli.display import format as fmt
from gptq_cli.placement.names import fold, leaf
from gptq_cli.results.bits import BitChoice, FusedBits
from gptq_cli.results.kept import OwnSettings
from gptq_cli.wording import number_of


def bits_text(bits: int | None) -> str:
    """`4 bits`, `dense`."""
    return "dense" if bits is None else f"{bits} bits"


def widths(bits: int, choice: BitChoice | None, own: Sequence[OwnSettings], linears: int) -> tuple[int, ...]:
    """The numbers of bits that the `linears` quantized ones (0: unknown how many) have; `bits` only where a
    linear is left that has no settings of its own."""
    if choice is not None:
        used = {one.bits for one in choice.fused if one.bits is not None}
    else:
        used = {one.bits for one in own}
        if not used or not linears or sum(one.linears for one in own) < linears:
            used.add(bits)
    return tuple(sorted(used)) or (bits,)


def widths_text(
    bits: int, choice: BitChoice | None, own: Sequence[OwnSettings] = (), linears: int = 0
) -> str:
    """`4 bits`; of a budget, or with settings by module, `2, 3 and 8 bits`. See `widths`."""
    *others, last = map(str, widths(bits, choice, own, linears))
    return f"{', '.join(others)} and {last} bits" if others else f"{last} bits"


def bits_rows(choice: BitChoice) -> Iterator[tuple[str, str]]:
    """What was asked for and reached; what it costs; and the bits of each kind of linears."""
    yield "bit budget", budget_text(choice)
    if choice.measured_tokens:
        yield "predicted KL", predicted_text(choice)
    label = "bits"
    for kind, counts in kinds(choice.fused).items():
        yield label, f"{kind}: {', '.join(_times(bits, counts) for bits in counts)}"
        label = ""


def budget_text(choice: BitChoice) -> str:
    """`4.25 bits per parameter of the whole file, 4.2497 reached: 412 bytes to spare`."""
    reached = f"{choice.bits_per_parameter:.4f} reached: {number_of(choice.spare_bytes, 'byte')} to spare"
    asked = f"{choice.asked:g} bits per parameter of the whole file, {reached}"
    return (
        asked
        if choice.measured_tokens
        else f"{asked}; not measured yet, so that every weight counts the same"
    )


def predicted_text(choice: BitChoice) -> str:
    """`0.1130, from 256 tokens; all linears alike: 3 bits 0.2090 in 4.312; …`."""
    others = "; ".join(
        f"{one.bits} bits {fmt.loss(one.kl)} in {one.bits_per_parameter:.3f}" for one in choice.uniform
    )
    beside = f"; all linears alike: {others}" if others else ""
    return f"{fmt.loss(choice.kl)}, from {choice.measured_tokens} tokens{beside}"


def kinds(fused: tuple[FusedBits, ...]) -> dict[str, Counter[int | None]]:
    """`self_attn.q_proj, k_proj, v_proj` -> how many sets of this kind have which bits, most bits last."""
    found: dict[str, Counter[int | None]] = {}
    for one in fused:
        found.setdefault(kind_of(one), Counter())[one.bits] += 1
    return {kind: Counter(dict(sorted(held.items(), key=_width))) for kind, held in found.items()}


def kind_of(fused: FusedBits) -> str:
    """The names of its linears without the numbers of blocks; what they have in common once."""
    first, *others = dict.fromkeys(map(fold, fused.linears))
    above = first.rpartition(".")[0]
    same = all(name.rpartition(".")[0] == above for name in others)
    return ", ".join([first, *(leaf(name) if same else name for name in others)])


def _width(counted: tuple[int | None, int]) -> int:
    return 99 if counted[0] is None else counted[0]


def _times(bits: int | None, counts: Counter[int | None]) -> str:
    return bits_text(bits) + (f" in {counts[bits]}" if len(counts) > 1 else "")
