from hypothesis import given
from hypothesis import strategies as st

from gptq_cli.ranks.leaves import (
    LEAVES,
    ROW_STEP,
    dealt,
    idle_ranks,
    leaf_count,
    leaf_of_each,
    pieces_of,
    row_ranges,
    share_of,
)

RANKS = st.integers(1, 40)


@given(pairs=st.integers(0, 40), others=st.integers(0, 40), batch_size=st.integers(1, 9), ranks=RANKS)
def test_every_sample_is_in_one_micro_batch_of_one_rank_whatever_their_number(
    pairs: int, others: int, batch_size: int, ranks: int
) -> None:
    leaves = leaf_count(ranks)
    numbers = range(pairs), range(pairs, pairs + others)
    shares = [share_of(*numbers, batch_size, leaves, rank, ranks) for rank in range(ranks)]
    alone = share_of(*numbers, batch_size, leaves, 0, 1)
    paired = [batch for share in shares for batch in share.batches[: share.paired]]
    rest = [batch for share in shares for batch in share.batches[share.paired :]]
    assert paired == alone.batches[: alone.paired]
    assert rest == alone.batches[alone.paired :]
    assert [sample for batch in (*paired, *rest) for sample in batch] == [*range(pairs + others)]
    before = 0
    for share in shares:
        assert share.first_pair == before
        assert list(share.leaves) == sorted(share.leaves)
        before += sum(len(batch) for batch in share.batches[: share.paired])
    assert {share.pairs for share in shares} == {pairs}


def test_leaves_cost_the_same_where_a_pair_costs_two() -> None:
    leaves = leaf_of_each(16, 96, 16)
    costs = [sum(2 if i < 16 else 1 for i, at in enumerate(leaves) if at == leaf) for leaf in range(16)]
    assert set(costs) == {8}


def test_more_ranks_than_leaves_have_more_leaves() -> None:
    assert [leaf_count(ranks) for ranks in (1, 2, 3, 16, 17, 64)] == [LEAVES] * 4 + [32, 64]


@given(rows=st.lists(st.integers(1, 200), min_size=1, max_size=5), ranks=RANKS)
def test_pieces_are_all_rows_once_and_in_order(rows: list[int], ranks: int) -> None:
    pieces = pieces_of(rows, ranks)
    found: list[list[int]] = [[] for _ in rows]
    for of_rank in pieces:
        for piece in of_rank:
            found[piece.linear] += range(piece.start, piece.stop)
    assert found == [list(range(count)) for count in rows]
    assert [sum(piece.rows for piece in of_rank) for of_rank in pieces] == [
        len(span) for span in row_ranges(sum(rows), ranks)
    ]


@given(pairs=st.integers(0, 20), others=st.integers(0, 20), ranks=RANKS)
def test_ranks_without_samples_are_counted(pairs: int, others: int, ranks: int) -> None:
    numbers = range(pairs), range(pairs, pairs + others)
    shares = [share_of(*numbers, 1, leaf_count(ranks), rank, ranks) for rank in range(ranks)]
    assert idle_ranks(pairs, others, ranks) == sum(not share.batches for share in shares)


def test_four_samples_for_each_rank_are_enough() -> None:
    assert not any(idle_ranks(min(16, 4 * ranks), max(0, 4 * ranks - 16), ranks) for ranks in range(1, 130))


def test_ranges_of_rows_begin_at_whole_vectors() -> None:
    spans = row_ranges(1000, 3)
    assert all(span.start % ROW_STEP == 0 for span in spans)
    assert max(map(len, spans)) - min(map(len, spans)) <= 2 * ROW_STEP


def test_experts_are_dealt_out_by_cost() -> None:
    assert dealt([1.0] * 8, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert dealt([6.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2) == [0, 1, 1, 1, 1, 1, 1]
    assert dealt([], 3) == []
    assert dealt([0.0, 0.0], 2) == [0, 0]
