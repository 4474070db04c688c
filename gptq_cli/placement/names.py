"""Dotted names of modules and tensors: what lies above one, and one spelling for its likes in all blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

_NUMBER = re.compile(r"(?:^|(?<=\.))[0-9]+(?=\.|$)")
_NUMBERS = re.compile(r"(?:^|(?<=\.))[0-9]+(?:[-,][0-9]+)*(?=\.|$)")


def parents(name: str) -> Iterator[str]:
    """What lies above `name`, the nearest first, without the root: `a.b.c` -> `a.b`, `a`."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def owner(tensor: str) -> str:
    """The module that a tensor belongs to; a tensor of the root stands for itself."""
    return tensor.rpartition(".")[0] or tensor


def leaf(name: str) -> str:
    """The last component: `model.layers.3.mlp` -> `mlp`."""
    return name.rpartition(".")[2]


def fold(name: str) -> str:
    """`model.layers.3.mlp.experts.7` -> `model.layers.*.mlp.experts.*`: equal for the likes of one module.

    Those of some blocks (`model.layers.0,2-3.mlp`, see `in_blocks`) as for one.
    """
    return _NUMBERS.sub("*", name)


def numbers(name: str) -> tuple[str, ...]:
    """What `fold` leaves out: `model.layers.3.mlp.experts.7` -> ("3", "7")."""
    return tuple(_NUMBER.findall(name))


def neighbours(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of neighbouring numbers."""
    ordered = sorted(set(numbers))
    start = 0
    for at in range(1, len(ordered) + 1):
        if at == len(ordered) or ordered[at] != ordered[at - 1] + 1:
            yield ordered[start], ordered[at - 1]
            start = at


def range_words(first: int, last: int) -> str:
    """`3`, or `3-5`, as patterns have it."""
    return str(first) if first == last else f"{first}-{last}"


def in_blocks(names: Iterable[tuple[str, str]]) -> str:
    """`model.layers.0,2-3.mlp.down_proj`, of (block, name): some of the modules that are alike."""
    found: dict[tuple[str, str], list[int]] = {}
    for block, name in names:
        above, dot, number = block.rpartition(".")
        if number.isdecimal():
            found.setdefault((above + dot, fold(name.removeprefix(block))), []).append(int(number))
        else:
            found[name, ""] = []
    return ", ".join(f"{above}{_numbers_text(held)}{rest}" for (above, rest), held in found.items())


def _numbers_text(numbers: Sequence[int]) -> str:
    """`0,2-3`."""
    return ",".join(range_words(first, last) for first, last in neighbours(numbers))
