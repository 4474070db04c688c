import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.planning.cases import Work
from gptq_cli.planning.ranks import (
    LINK_BYTES_PER_SECOND,
    Traffic,
    block_traffic,
    seconds_of_block,
)
from gptq_cli.planning.schedule import StageShape
from gptq_cli.planning.time import BlockCost

STAGES = (StageShape(4096, 6144), StageShape(4096, 4096), StageShape(4096, 28672), StageShape(14336, 4096))
OWN = Work(QuantizeConfig(group_size=128, solve_for="own"), CalibrationConfig())
DENSE = Work(QuantizeConfig(group_size=128, solve_for="dense"), CalibrationConfig())
NOTHING = Traffic(0.0, 0.0)


def test_what_is_shared_is_divided_and_what_is_not_stays() -> None:
    cost = BlockCost(samples=160.0, rows=16.0, factors=3.0, columns=5.0)
    assert seconds_of_block(cost, NOTHING, STAGES, 1) == cost.total
    assert seconds_of_block(cost, NOTHING, STAGES, 8) == 20.0 + 2.0 + 3.0 + 5.0


def test_an_uneven_share_of_the_leaves_is_the_largest() -> None:
    cost = BlockCost(samples=16.0, rows=0.0, factors=0.0, columns=0.0)
    assert seconds_of_block(cost, NOTHING, STAGES, 6) == 3.0  # 16 leaves: 3 for the busiest


def test_experts_are_dealt_out_with_their_factors() -> None:
    experts = tuple(StageShape(2048, 1536, "experts") for _ in range(64))
    cost = BlockCost(samples=0.0, rows=0.0, factors=8.0, columns=8.0)
    assert seconds_of_block(cost, NOTHING, experts, 4) == 4.0


def test_traffic_takes_time_only_between_several() -> None:
    cost, busy = BlockCost(0.0, 0.0, 0.0, 0.0), Traffic(LINK_BYTES_PER_SECOND, LINK_BYTES_PER_SECOND)
    assert seconds_of_block(cost, busy, STAGES, 1) == 0.0
    assert seconds_of_block(cost, busy, STAGES, 2) == 2.0


def test_the_lower_triangle_of_each_hessian_and_the_codes_of_all_rows_travel() -> None:
    one = block_traffic((StageShape(1024, 2048),), OWN, 2)
    assert one.sum_bytes == 4 * 0.5625 * 1024**2
    assert one.code_bytes == 2048 * (1024 + 3 * 8) / 2
    assert block_traffic(STAGES, DENSE, 2).sum_bytes == pytest.approx(
        block_traffic(STAGES, OWN, 2).sum_bytes * (2 * 0.5625 + 2) / 0.5625
    )
    assert block_traffic(STAGES, DENSE, 1).total == 0.0
