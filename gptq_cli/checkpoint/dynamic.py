r"""`dynamic`: which linears are dense, and which have settings of their own, as regular expressions.

GPTQModel introduced the field, and vLLM and SGLang read it, too: the keys are tried in their order with
`re.match`, and the first that matches wins. `-:PATTERN` leaves a linear dense, `+:PATTERN` (or `PATTERN`
alone) changes fields. But each reader matches names of its own: what the files call
`model.language_model.layers.0.mlp.up_proj` is `language_model.model.layers.0.mlp.gate_up_proj` in vLLM. So a
pattern says nothing of what stands before the blocks, has the names of fused matrices, and covers what lies
inside:

    -:(.*\.)?layers\.\d+\.linear_attn\.(in_proj_a|in_proj_b|in_proj_ba)(\..*)?$

Patterns are made of whole components of names, so that `layers.1` never covers `layers.10`. Each is compared
with every linear that it must not cover; where it would cover one, it lists the numbers of the blocks, or
more of what stands before them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from gptq_cli.placement.names import fold, leaf, parents
from gptq_cli.targets.names import fused_names

_WRAPPERS = ("model", "language_model", "model.language_model")
"""Readers take them away from names, or put them in front: they stand for nothing."""
_NUMBERS_IN_A_PATTERN = 100
"""Longer lists are split: readers, this one too, limit the length of a pattern."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """Settings of a linear that differ from the checkpoint's; None: as everywhere."""

    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None

    @property
    def fields(self) -> dict[str, int | bool]:
        """What `dynamic` says of it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def render(
    quantized: Mapping[str, Override | None], dense: Iterable[str], aliases: Mapping[str, str] | None = None
) -> dict[str, dict[str, int | bool]]:
    """`dynamic` for linears under their names in the files.

    `quantized`: every packed linear, and what differs from the checkpoint's settings. `dense`: modules with
    matrices that stay as they are; one that holds a packed linear is left out, since a pattern for it would
    cover that. `aliases`: other names of the same modules, that a reader may know them under.
    """
    others = dict(aliases or {})
    packed = {name: override or Override() for name, override in quantized.items()}
    packed |= {others[name]: override for name, override in list(packed.items()) if name in others}
    left = dict.fromkeys(alias for name in dense for alias in (name, others.get(name, name)))
    above = {parent for name in packed for parent in parents(name)}
    left = {name: None for name in left if name and name not in packed and name not in above}
    leaves = _leaves((*packed, *left))
    result: dict[str, dict[str, int | bool]] = {
        f"-:{pattern}": {} for pattern in _patterns(left, packed, leaves, whole=True)
    }
    for override in dict.fromkeys(packed.values()):
        if override.fields:
            same = [name for name, value in packed.items() if value == override]
            rest = [name for name, value in packed.items() if value != override]
            for pattern in _patterns(same, rest, leaves, whole=False):
                result[f"+:{pattern}"] = override.fields
    return result


def _leaves(names: Iterable[str]) -> dict[str, set[str]]:
    """Module -> the last components of what it holds."""
    result: dict[str, set[str]] = {}
    for name in names:
        result.setdefault(name.rpartition(".")[0], set()).add(leaf(name))
    return result


_Part = frozenset[str] | None
"""A component of a name: one of these words, or any number."""


def _patterns(
    names: Iterable[str], avoid: Collection[str], leaves: Mapping[str, Collection[str]], *, whole: bool
) -> Iterator[str]:
    """Regular expressions that match all of `names` and none of `avoid`, whatever stands before the blocks.

    `whole`: a module above the blocks may stand for all that it holds. `leaves`: what every module holds.
    """
    forbidden = _Forbidden(avoid)
    alike = [name for name in names if fold(name) not in forbidden.folded]
    single = {
        _highest(name, forbidden.names, whole=whole): None for name in names if fold(name) in forbidden.folded
    }
    alike = [name for name in alike if not any(parent in single for parent in parents(name))]
    places: dict[tuple[_Part, ...], list[str]] = {}
    for name in alike:
        highest = _highest(fold(name), forbidden.folded, whole=whole)
        places.setdefault(_parts(highest), []).append(_cut(name, like=highest))
    for parts, held in _numbered(single):
        places.setdefault(parts, []).extend(held)
    for parts in _with_fused(places, leaves):
        yield forbidden.pattern(parts)


def _highest(name: str, forbidden: Collection[str], *, whole: bool) -> str:
    """The highest module over `name`, or itself, that is not in `forbidden`; not above the numbers unless
    `whole`."""
    for parent in parents(name):
        if parent in forbidden or parent in _WRAPPERS or not (whole or _has_number(parent)):
            break
        name = parent
    return name


def _cut(name: str, *, like: str) -> str:
    """As many components of `name` as `like` has."""
    return ".".join(name.split(".")[: like.count(".") + 1])


def _has_number(name: str) -> bool:
    return any(word == "*" or word.isdecimal() for word in name.split("."))


def _parts(folded: str) -> tuple[_Part, ...]:
    return tuple(None if word == "*" else frozenset({word}) for word in folded.split("."))


def _numbered(names: Iterable[str]) -> Iterator[tuple[tuple[_Part, ...], list[str]]]:
    """Names whose numbers matter: those that differ in numbers alone, with the lists of these."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(fold(name), []).append(name)
    for folded, held in alike.items():
        wild = _parts(folded)
        numbers = {tuple(word for word in name.split(".") if word.isdecimal()): name for name in held}
        for product in _products(set(numbers)):
            lists = iter(product)
            covered = [
                name for key, name in numbers.items() if all(map(frozenset.__contains__, product, key))
            ]
            yield tuple(next(lists) if part is None else part for part in wild), covered


def _products(rows: Collection[tuple[str, ...]]) -> Iterator[tuple[frozenset[str], ...]]:
    """Rows of numbers, as few products of sets: {(0, 1), (0, 2), (3, 1), (3, 2)} is {0, 3} x {1, 2}."""
    rests: dict[str, set[tuple[str, ...]]] = {}
    for first, *rest in filter(None, rows):
        rests.setdefault(first, set()).add(tuple(rest))
    if not rests:
        yield ()
    firsts: dict[frozenset[tuple[str, ...]], list[str]] = {}
    for first in sorted(rests, key=int):
        firsts.setdefault(frozenset(rests[first]), []).append(first)
    for rest_rows, equal in firsts.items():
        for start in range(0, len(equal), _NUMBERS_IN_A_PATTERN):
            some = frozenset(equal[start : start + _NUMBERS_IN_A_PATTERN])
            for product in _products(rest_rows):
                yield some, *product


def _with_fused(
    places: Mapping[tuple[_Part, ...], Sequence[str]], leaves: Mapping[str, Collection[str]]
) -> Iterator[tuple[_Part, ...]]:
    """What differs in the last component alone is one pattern, which has the names of fused matrices, too."""
    owners: dict[tuple[_Part, ...], tuple[set[str], set[str]]] = {}
    for (*owner, last), held in places.items():
        if last is None or not all(map(str.isidentifier, last)):
            yield (*owner, last)
            continue
        words, present = owners.setdefault(tuple(owner), (set(), set()))
        words |= last
        for name in held:
            present.update(leaves.get(name.rpartition(".")[0], ()))
    for above, (words, present) in owners.items():
        yield (*above, frozenset({*words, *fused_names(words, present)}))


class _Forbidden:
    """Names that no pattern may match."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = {*names, *(parent for name in names for parent in parents(name))}
        """And the modules that hold them."""
        self.folded = {fold(name) for name in self.names}
        self._alike: dict[str, list[str]] = {}
        for name in names:
            self._alike.setdefault(fold(name), []).append(name)

    def pattern(self, parts: Sequence[_Part]) -> str:
        """The shortest end of `parts`, from the blocks on, that matches none of these names."""
        numbers = [place for place, part in enumerate(parts) if _is_number(part)]
        start = max(numbers[0] - 1, 0) if numbers else len(parts) - 1
        while start > 0 and self._hit(parts[start:]):
            start -= 1
        return _text(parts[start:], anywhere=start > 0 or not self._hit(parts))

    def _hit(self, run: Sequence[_Part]) -> bool:
        match = re.compile(_text(run, anywhere=True)).match
        return any(
            _holds(folded.split("."), run) and any(match(name) for name in held)
            for folded, held in self._alike.items()
        )


def _text(run: Sequence[_Part], *, anywhere: bool) -> str:
    """The regular expression; `anywhere`: whatever stands before."""
    before = r"(.*\.)?" if anywhere else ""
    inside = r"\.".join(map(_component, run))
    return rf"{before}{inside}(\..*)?$"


def _holds(words: Sequence[str], run: Sequence[_Part]) -> bool:
    """Whether components of a name that follow each other are those of `run`; `*` is some number."""
    length = len(run)
    return any(
        all(_fits(part, word) for part, word in zip(run, words[start : start + length], strict=True))
        for start in range(len(words) - length + 1)
    )


def _fits(part: _Part, word: str) -> bool:
    if part is None:
        return word == "*" or word.isdecimal()
    return word in part or (word == "*" and _is_number(part))


def _is_number(part: _Part) -> bool:
    return part is None or all(map(str.isdecimal, part))


def _component(part: _Part) -> str:
    if part is None:
        return r"\d+"
    words = sorted(part, key=lambda word: (len(word), word))
    return re.escape(words[0]) if len(words) == 1 else f"({'|'.join(map(re.escape, words))})"
