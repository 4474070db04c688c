"""Spending a budget of bits: what may be chosen for each set of fused linears, and the best choice.

A budget counts the whole checkpoint: codes, scales, zeros and `g_idx` of the quantized linears, everything
that stays dense, embeddings first of all, and the headers of the files. So the size of the file with every
choice is known before the work, to the byte.

What may be chosen for a set: the bits at which its codes and zeros fill whole words, or dense; and of these
what every target reads. Which that is, the rules about the targets say: a planned checkpoint is made with the
choice in question, and asked about. Where a reader has no place for settings by module, all linears get the
same bits; where it has none for those of a kind (SGLang's experts), they get the checkpoint's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gptq_cli.config import HEAD_BITS, QuantizeConfig
from gptq_cli.model.facts import LinearFact, ModelFacts, can_be_packed
from gptq_cli.module_settings import ALLOWED_BITS, ModuleRule, settings_for
from gptq_cli.placement.names import fold, neighbours, range_words
from gptq_cli.planning.knapsack import Option, choose
from gptq_cli.planning.memory import packed_bytes
from gptq_cli.planning.target_facts import target_facts, with_few_experts
from gptq_cli.readers import Target
from gptq_cli.targets.check import check_target

Bits = int | None
"""Bits of a code; None: dense."""
_ROUNDS = 16
"""Of choosing, until what headers and odd dtypes add is counted exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLinears:
    """Linears that get the same bits, because a server loads them as one matrix; or the head."""

    linears: tuple[LinearFact, ...]
    sizes_bytes: Mapping[Bits, int]
    """What may be chosen -> bytes of their tensors in the file."""
    given: bool = False
    """Their bits were given by module."""
    at_base: bool = False
    """They have no settings of their own: their bits are the checkpoint's."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the linears."""
        return tuple(linear.name for linear in self.linears)

    def size_at(self, bits: Bits) -> int:
        """Bytes of their tensors at `bits`; 0 where these cannot be chosen."""
        return self.sizes_bytes.get(bits, 0)

    @property
    def weights(self) -> int:
        """Of all of them."""
        return sum(linear.in_features * linear.out_features for linear in self.linears)


def fused_linears(
    facts: ModelFacts, config: QuantizeConfig, targets: Sequence[Target], tp: int
) -> tuple[FusedLinears, ...]:
    """Every set of the model and what may be chosen for it, in model order, the head last.

    `facts`: all linears that can be quantized are, and the head is where it may be. `config`: with a number
    for the group size.
    """
    sets: dict[tuple[str, str], list[LinearFact]] = {}
    for linear in facts.linears:
        sets.setdefault(linear.fused_with, []).append(linear)
    readable = _Readable(with_few_experts(facts), config, targets, tp)
    found = [_fused(facts, config, held, readable) for held in sets.values()]
    if facts.head is not None:
        found.append(_head(facts, config, facts.head, readable))
    return tuple(found)


def _fused(
    facts: ModelFacts, config: QuantizeConfig, linears: Sequence[LinearFact], readable: _Readable
) -> FusedLinears:
    kinds = {fold(linear.name) for linear in linears}
    own = (settings_for(config.modules, linear.name).bits for linear in linears)
    fixed = sorted({bits for bits in own if bits is not None})
    allowed: list[Bits] = []
    for bits in fixed or ALLOWED_BITS:
        whole = all(_whole(linear, config.of_linear(linear.name), bits) for linear in linears)
        if fixed or (whole and not any(readable.refuses(linear.name, bits) for linear in linears)):
            allowed.append(bits)
    if not fixed and not readable.refuses_dense(kinds):
        allowed.append(None)
    return FusedLinears(
        linears=tuple(linears),
        sizes_bytes={bits: _bytes(facts, config, linears, bits) for bits in allowed or [config.bits]},
        given=bool(fixed),
        at_base=not fixed and readable.only_at_base(kinds),
    )


def _head(facts: ModelFacts, config: QuantizeConfig, head: LinearFact, readable: _Readable) -> FusedLinears:
    fixed = settings_for(config.modules, head.name).bits
    allowed: list[Bits] = [
        bits
        for bits in (ALLOWED_BITS if fixed is None else (fixed,))
        if _whole(head, config.of_linear(head.name), bits) and not readable.refuses_head(bits)
    ]
    if not config.quantize_head:
        allowed.append(None)
    sizes = {bits: _bytes(facts, config, (head,), bits) for bits in allowed or [config.bits]}
    if facts.head_is_tied and None in sizes:
        sizes[None] = 0  # it is the embedding, which is there anyhow
    return FusedLinears(linears=(head,), sizes_bytes=sizes, given=fixed is not None)


def _whole(linear: LinearFact, config: QuantizeConfig, bits: int) -> bool:
    """Whether a linear of this configuration can have `bits` instead."""
    return can_be_packed(linear.in_features, linear.out_features, bits, config.group_columns)


def _bytes(facts: ModelFacts, config: QuantizeConfig, linears: Sequence[LinearFact], bits: Bits) -> int:
    if bits is None:
        return sum(x.in_features * x.out_features for x in linears) * facts.dtype_bytes
    alike = Counter((config.of_linear(x.name), x.in_features, x.out_features) for x in linears)
    examples = {(config.of_linear(x.name), x.in_features, x.out_features): x for x in linears}
    return sum(
        count * packed_bytes(examples[kind], replace(kind[0], bits=bits, modules=()))
        for kind, count in alike.items()
    )


class _Readable:
    """What the targets read, found out by asking their rules about planned checkpoints."""

    def __init__(self, facts: ModelFacts, config: QuantizeConfig, targets: Sequence[Target], tp: int) -> None:
        self._facts, self._targets, self._tp = facts, targets, tp
        self._config = replace(config, quantize_head=False)
        uniform = {bits: self._errors(facts, replace(self._config, bits=bits)) for bits in ALLOWED_BITS}
        clean = [bits for bits, said in uniform.items() if None not in said]
        self._few = clean or list(ALLOWED_BITS)
        self._refused = uniform if clean else {}
        self._base = replace(self._config, bits=4 if 4 in self._few else self._few[-1])
        self._at_base = self._errors(facts, self._base)

    def _errors(self, facts: ModelFacts, config: QuantizeConfig) -> set[str | None]:
        """The linears that a target refuses; None where it refuses the whole."""
        planned = target_facts(facts, config, self._tp)
        said = (found for one in self._targets for found in check_target(one, planned))
        return {name for found in said if found.level == "error" for name in found.modules or (None,)}

    def refuses(self, name: str, bits: int) -> bool:
        """Whether a target refuses the linear at these bits."""
        refused = self._refused.get(bits, set())
        return None in refused or name in refused

    def refuses_dense(self, kinds: set[str]) -> bool:
        """Whether a target refuses a checkpoint in which linears of these kinds are dense."""
        if not self._targets:
            return False
        dense = [x.name for x in self._facts.linears if fold(x.name) in kinds]
        facts = replace(
            self._facts,
            linears=tuple(x for x in self._facts.linears if fold(x.name) not in kinds),
            dense_linears=(*self._facts.dense_linears, *dense),
        )
        return bool(self._errors(facts, self._base) - self._at_base)

    def only_at_base(self, kinds: set[str]) -> bool:
        """Whether a target refuses linears of these kinds with bits other than the checkpoint's."""
        others = [bits for bits in self._few if bits != self._base.bits]
        if not self._targets or not others:
            return bool(self._targets) and self.refuses_dense(kinds)
        rules = tuple(ModuleRule(pattern=kind, bits=others[-1]) for kind in sorted(kinds))
        mixed = replace(self._base, modules=(*rules, *self._base.modules))
        return bool(self._errors(self._facts, mixed) - self._at_base)

    def refuses_head(self, bits: int) -> bool:
        """Whether a target refuses a head of these bits."""
        head = self._facts.head
        if not self._targets or head is None:
            return False
        rules = (*self._base.modules, ModuleRule(pattern=head.name, bits=bits))
        with_head = replace(self._base, quantize_head=True, modules=rules)
        return bool(self._errors(self._facts, with_head) - self._at_base)


Losses = Callable[[FusedLinears, Bits], float]
"""What a set is predicted to lose at these bits."""


@dataclass(frozen=True, slots=True)
class Range:
    """What can be reached, in bytes of the whole file."""

    least_bytes: int
    most_bytes: int


@dataclass(frozen=True, slots=True)
class Spent:
    """The bits of every set, in order, and the bytes of the file."""

    bits: tuple[Bits, ...]
    size_bytes: int


class Budget:
    """Choices for the sets of one model; `file_bytes` says what the file has with bits for every set."""

    def __init__(self, fused: Sequence[FusedLinears], file_bytes: Callable[[tuple[Bits, ...]], int]) -> None:
        self.fused = tuple(fused)
        self._file_bytes = file_bytes
        base = [place for place, one in enumerate(self.fused) if one.at_base]
        self._items = [base, *([place] for place in range(len(self.fused)) if place not in set(base))]
        self._items = [item for item in self._items if item]
        """Places of sets that get the same bits."""

    def _options(self, item: Sequence[int]) -> list[Bits]:
        """What all sets of an item can be, the smallest first."""
        sets = [self.fused[place] for place in item]
        shared = [bits for bits in sets[0].sizes_bytes if all(bits in one.sizes_bytes for one in sets)]
        return sorted(shared or [*sets[0].sizes_bytes][:1], key=lambda bits: 99 if bits is None else bits)

    def _at(self, item: Sequence[int], bits: Bits) -> int:
        return sum(self.fused[place].size_at(bits) for place in item)

    def _spread(self, chosen: Sequence[Bits]) -> tuple[Bits, ...]:
        """From items to sets."""
        of_place = {place: bits for item, bits in zip(self._items, chosen, strict=True) for place in item}
        return tuple(of_place[place] for place in range(len(self.fused)))

    def range(self) -> Range:
        """The smallest and the largest file."""
        ends = []
        for pick in (min, max):
            sizes = [{bits: self._at(item, bits) for bits in self._options(item)} for item in self._items]
            chosen = [pick(held, key=held.__getitem__) for held in sizes]
            ends.append(self._file_bytes(self._spread(chosen)))
        return Range(*ends)

    def uniform(self, bits: int) -> Spent | None:
        """What `--bits` would come to: every set that can has `bits`, the others are dense, and so is the
        head, or at `HEAD_BITS`; what was given by module stays. None where a set can be neither, and where
        no set of a block can have `bits`, as with a target that does not read them."""
        if not any(one.linears[0].block and not one.given and bits in one.sizes_bytes for one in self.fused):
            return None
        chosen: list[Bits] = []
        for one in self.fused:
            if one.given:
                chosen.append(next(iter(one.sizes_bytes)))
                continue
            wanted = bits if one.linears[0].block or None not in one.sizes_bytes else None
            wanted = HEAD_BITS if wanted is not None and not one.linears[0].block else wanted
            if wanted not in one.sizes_bytes and None not in one.sizes_bytes:
                return None
            chosen.append(wanted if wanted in one.sizes_bytes else None)
        return Spent(tuple(chosen), self._file_bytes(tuple(chosen)))

    def spend(self, budget_bytes: int, loss: Losses) -> Spent | None:
        """The choice of least predicted loss whose file has at most `budget_bytes`; None where none has."""
        options = [self._options(item) for item in self._items]
        priced = [
            [
                Option(self._at(item, bits), sum(loss(self.fused[place], bits) for place in item))
                for bits in held
            ]
            for item, held in zip(self._items, options, strict=True)
        ]
        least = [min(item, key=lambda one: one.size_bytes) for item in priced]
        chosen = [held[item.index(one)] for held, item, one in zip(options, priced, least, strict=True)]
        best = Spent(self._spread(chosen), self._file_bytes(self._spread(chosen)))
        beside = best.size_bytes - sum(one.size_bytes for one in least)
        for _ in range(_ROUNDS):
            found = choose(priced, budget_bytes - beside)
            if found is None:
                break
            bits = self._spread([held[at] for held, at in zip(options, found.places, strict=True)])
            size_bytes = self._file_bytes(bits)
            if size_bytes <= budget_bytes:
                return Spent(bits, size_bytes)
            beside = max(beside + 1, size_bytes - found.size_bytes)  # so this choice does not fit again
        return best if best.size_bytes <= budget_bytes else None

    def plainest(self, spent: Spent, budget_bytes: int, loss: Losses, gain: float) -> Spent:
        """`spent`, or the same bits everywhere where these fit and lose at most `gain` more of it."""
        uniform = [held for bits in ALLOWED_BITS if (held := self.uniform(bits)) is not None]
        fitting = [held for held in uniform if held.size_bytes <= budget_bytes]
        best = min(fitting, key=lambda held: self._lost(held, loss), default=spent)
        return best if self._lost(spent, loss) > (1 - gain) * self._lost(best, loss) else spent

    def _lost(self, spent: Spent, loss: Losses) -> float:
        return sum(loss(one, bits) for one, bits in zip(self.fused, spent.bits, strict=True))


def settled(config: QuantizeConfig, fused: Sequence[FusedLinears], bits: Sequence[Bits]) -> QuantizeConfig:
    """`config` with these bits for the sets, as settings by module; what was said by module comes after.

    The most common bits become the checkpoint's, unless some sets have to have just these.
    """
    treated = [(one, held) for one, held in zip(fused, bits, strict=True)]
    weights: Counter[int] = Counter()
    for one, held in treated:
        if held is not None and one.linears[0].block:
            weights[held] += one.weights
    tied = [held for one, held in treated if one.at_base and held is not None]
    base = tied[0] if tied else max(weights, key=lambda held: (weights[held], held), default=config.bits)
    head = next(((one, held) for one, held in treated if not one.linears[0].block), None)
    rules = _rules([(one, held) for one, held in treated if held != base and one.linears[0].block])
    if head is not None and head[1] is not None:
        rules.append(ModuleRule(pattern=head[0].linears[0].name, bits=head[1]))
    return replace(
        config,
        bits=base,
        bits_per_weight=None,
        modules=(*rules, *config.modules),
        quantize_head=head is not None and head[1] is not None,
    )


def _rules(treated: Sequence[tuple[FusedLinears, Bits]]) -> list[ModuleRule]:
    """One rule for linears alike in neighbouring blocks."""
    blocks: dict[tuple[str, str, Bits], list[int]] = {}
    single: list[ModuleRule] = []
    for one, bits in treated:
        for linear in one.linears:
            above, _, number = linear.block.rpartition(".")
            rest = linear.name.removeprefix(linear.block)
            rest = fold(rest) if linear.routed else rest
            if not number.isdecimal():
                single.append(_rule(linear.name, bits))
                continue
            held = blocks.setdefault((above, rest, bits), [])
            if int(number) not in held[-1:]:
                held.append(int(number))
    kinds = list(dict.fromkeys(rest for _, rest, _ in blocks))
    runs = [(key, *ends) for key, numbers in blocks.items() for ends in neighbours(numbers)]
    rules = []
    for (above, rest, bits), first, last in sorted(runs, key=lambda run: (kinds.index(run[0][1]), run[1])):
        words = range_words(first, last)
        rules.append(_rule(f"{above}.{words}{rest}" if above else f"{words}{rest}", bits))
    return [*rules, *single]


def _rule(pattern: str, bits: Bits) -> ModuleRule:
    return ModuleRule(pattern=pattern, dense=True) if bits is None else ModuleRule(pattern=pattern, bits=bits)
