"""Dotted names of modules and tensors: what lies above one, and one spelling for its likes in all blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator

_NUMBER = re.compile(r"(?:^|(?<=\.))[0-9]+(?=\.|$)")


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
    """`model.layers.3.mlp.experts.7` -> `model.layers.*.mlp.experts.*`: equal for the likes of one module."""
    return _NUMBER.sub("*", name)


def numbers(name: str) -> tuple[str, ...]:
    """What `fold` leaves out: `model.layers.3.mlp.experts.7` -> ("3", "7")."""
    return tuple(_NUMBER.findall(name))
