"""Sums whose rounding does not depend on who adds.

    leaves      0   1   2   3   4   5   6   7
                 \\ /     \\ /     \\ /     \\ /
                  +       +       +       +
                    \\   /           \\   /
                      +               +
                          \\      /
                             sum

Leaf sums are always added in this binary tree. A rank that has leaves 2 to 7 keeps the sums of its *nodes*,
the largest whole subtrees: 2-3 and 4-7. Whoever adds the nodes of all ranks in the same tree gets the same
bits, whatever the number of ranks. A leaf that nothing fell into is left out: x + 0 = x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Node = tuple[int, int]
"""(first leaf, number of leaves): a power of two that divides the first leaf."""


def nodes_of(leaves: range) -> list[Node]:
    """The largest whole subtrees that make up a contiguous set of leaves, in order."""
    found: list[Node] = []
    first = leaves.start
    while first < leaves.stop:
        size = first & -first or 1 << (leaves.stop - first).bit_length()
        while first + size > leaves.stop:
            size >>= 1
        found.append((first, size))
        first += size
    return found


def most_kept(leaves: range) -> int:
    """Sums that a `TreeSum` of these leaves holds at once: before a leaf is added to its neighbour."""
    return max((len(nodes_of(range(leaves.start, leaf))) + 1 for leaf in leaves), default=0)


class TreeSum:
    """The sum of what is added leaf by leaf, or node by node, in order; at most log2 of them are kept."""

    def __init__(self, leaves: range) -> None:
        self._next, self._leaves = leaves.start, leaves
        self._kept: list[tuple[Node, Tensor | None]] = []

    def add(self, node: Node, value: Tensor | None) -> None:
        """`value` becomes this object's own, to add others to. What lies between is left out."""
        for empty in nodes_of(range(self._next, node[0])):
            self._push(empty, None)
        self._push(node, value)
        self._next = sum(node)

    def nodes(self) -> list[tuple[Node, Tensor | None]]:
        """The sums of the largest whole subtrees, in order; None where nothing fell into one."""
        for empty in nodes_of(range(self._next, self._leaves.stop)):
            self._push(empty, None)
        self._next = self._leaves.stop
        return self._kept

    def _push(self, node: Node, value: Tensor | None) -> None:
        self._kept.append((node, value))
        while len(self._kept) > 1 and _siblings(self._kept[-2][0], self._kept[-1][0]):
            (_, b), ((first, size), a) = self._kept.pop(), self._kept.pop()
            both = b if a is None else a if b is None else a.add_(b)
            self._kept.append(((first, 2 * size), both))


def _siblings(a: Node, b: Node) -> bool:
    return a[1] == b[1] and a[0] + a[1] == b[0] and a[0] % (2 * a[1]) == 0


def total(
    nodes: Iterator[tuple[Node, Tensor | None]] | Sequence[tuple[Node, Tensor | None]], leaves: int
) -> Tensor | None:
    """The sum of the nodes of all ranks, in order; the tensors are added in place."""
    tree = TreeSum(range(leaves))
    for node, value in nodes:
        tree.add(node, value)
    ((_, value),) = tree.nodes()
    return value
