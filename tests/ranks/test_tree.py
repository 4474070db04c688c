import pytest
import torch
from torch import Tensor

from gptq_cli.ranks.leaves import part_of
from gptq_cli.ranks.tree import Node, TreeSum, most_kept, nodes_of, total

LEAVES = 16


def values(missing: set[int]) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {leaf: torch.randn(50, generator=generator) for leaf in range(LEAVES)}
    return {leaf: value for leaf, value in made.items() if leaf not in missing}


def summed(ranks: int, missing: set[int]) -> Tensor | None:
    there: list[tuple[Node, Tensor | None]] = []
    for rank in range(ranks):
        own = part_of(LEAVES, rank, ranks)
        tree = TreeSum(own)
        for leaf, value in values(missing).items():
            if leaf in own:
                tree.add((leaf, 1), value)
        nodes = tree.nodes()
        assert [node for node, _ in nodes] == nodes_of(own)
        there += [(node, value) for node, value in nodes if value is not None]
    return total(there, LEAVES)


@pytest.mark.parametrize("missing", [set(), {3, 7, 8}, set(range(12)), set(range(1, 16))])
def test_the_sum_has_the_same_bits_for_any_number_of_ranks(missing: set[int]) -> None:
    found = [summed(ranks, missing) for ranks in range(1, LEAVES + 1)]
    assert found[0] is not None
    torch.testing.assert_close(found[0], torch.stack(list(values(missing).values())).sum(0))
    assert all(other is not None and torch.equal(other, found[0]) for other in found)


def test_the_order_matters_so_that_the_test_above_can_fail() -> None:
    whole = summed(1, set())
    chain = torch.zeros(50)
    for value in values(set()).values():
        chain += value
    assert whole is not None
    assert not torch.equal(whole, chain)


def test_nothing_fell_into_any_leaf() -> None:
    assert summed(3, set(range(LEAVES))) is None


def test_nodes_are_the_largest_whole_subtrees() -> None:
    assert nodes_of(range(2, 8)) == [(2, 2), (4, 4)]
    assert nodes_of(range(0, 5)) == [(0, 4), (4, 1)]
    assert nodes_of(range(5, 11)) == [(5, 1), (6, 2), (8, 2), (10, 1)]
    assert nodes_of(range(0)) == []


def test_few_sums_are_kept_while_adding() -> None:
    tree = TreeSum(range(1024))
    most = 0
    for leaf in range(1000):
        tree.add((leaf, 1), torch.ones(1))
        most = max(most, len(tree._kept))
    assert most <= 10


def test_a_rank_keeps_the_logarithm_of_its_leaves_and_the_one_that_is_added() -> None:
    assert [most_kept(range(16 // ranks)) for ranks in (1, 2, 4, 16)] == [5, 4, 3, 1]
    assert most_kept(range(5, 10)) == 4  # 5, 6-7 and 8, and 9 that is added to 8
    assert most_kept(range(0)) == 0
