"""What several processes gain, by the costs of the busiest one."""

from dataclasses import replace

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import Device
from gptq_cli.placement.placement import Placement, PlacementEntry
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.costs import block_costs
from gptq_cli.planning.ranks import PHASES, ranks_plan
from gptq_cli.planning.rates import MachineRates
from gptq_cli.planning.schedule import WAYS, make_schedule
from gptq_cli.planning.time import job_seconds
from gptq_cli.ranks.leaves import idle_ranks
from tests.planning.schedules import schedule
from tests.preflight.shapes import llama, mixture

FACTS = llama(blocks=4, hidden=4096, inner=14336)
WORK = Work(QuantizeConfig(group_size=128), CalibrationConfig(samples=128, seq_len=2048))
SPEED = MachineRates(2e14, 3e13, 1.5e14, 3e-5, 1e-11, disk_rate=5e9)


def on_a_card(facts: ModelFacts, work: Work) -> Schedule:
    card = Device("cuda", 0)
    entry = PlacementEntry("", card, facts.size_bytes, parameters=True)
    return make_schedule(Placement((entry,), card, "a test"), facts, work, WAYS[0])


def test_samples_and_rows_are_shared_and_the_walk_over_columns_is_not() -> None:
    plan = on_a_card(FACTS, WORK)
    alone, eight = (block_costs(FACTS, replace(WORK, ranks=n), plan, SPEED)["model.layers.0"] for n in (1, 8))
    assert eight.samples == pytest.approx(alone.samples / 8, rel=0.02)
    assert eight.rows == pytest.approx(alone.rows / 8)
    assert eight.factors == pytest.approx(alone.factors / 5), "one of five has to wait for nothing"
    assert (eight.columns, eight.weights) == (alone.columns, alone.weights)
    assert alone.exchange == 0.0 < eight.exchange


def test_an_uneven_share_of_the_leaves_is_the_largest() -> None:
    own = Work(QuantizeConfig(group_size=128, solve_for="own"), WORK.calibration)
    plan = on_a_card(FACTS, own)
    alone, six = (block_costs(FACTS, replace(own, ranks=n), plan, SPEED)["model.layers.0"] for n in (1, 6))
    assert six.samples == pytest.approx(alone.samples * 3 / 16)  # 16 leaves: 3 for the busiest


def test_experts_are_dealt_out_and_walked_over_side_by_side() -> None:
    facts = mixture(experts=64, hidden=2048, inner=1024)
    work = Work(QuantizeConfig(group_size=128, solve_for="own"), CalibrationConfig(samples=64, seq_len=512))
    plan = on_a_card(facts, work)
    found = {
        n: block_costs(facts, replace(work, ranks=n), plan, SPEED)["model.layers.0"] for n in (1, 2, 16, 32)
    }
    assert found[2].factors < 0.75 * found[1].factors
    assert found[16].columns <= found[2].columns < found[1].columns
    walked = {n: one.columns / SPEED.column_seconds / 2048 for n, one in found.items()}
    assert walked[32] == walked[16], "one walk over each batch, however few experts of it a rank has"


def test_a_plan_names_time_phases_traffic_and_where_more_stop_paying() -> None:
    schedule_ = on_a_card(FACTS, WORK)
    plan = ranks_plan(FACTS, WORK, schedule_, SPEED, 8)
    assert plan.seconds == pytest.approx(sum(phase.seconds for phase in plan.phases))
    alone = sum(phase.alone_seconds for phase in plan.phases)
    assert alone == pytest.approx(job_seconds(FACTS, WORK, schedule_, SPEED))
    assert plan.seconds is not None
    assert plan.speed_up == pytest.approx(alone / plan.seconds)
    assert {phase.phase for phase in plan.phases} < {*PHASES.values(), "reading, start and end"}
    parts = (plan.sum_bytes_per_block, plan.code_bytes_per_block, plan.factor_bytes_per_block)
    assert plan.bytes_per_block == sum(parts)
    assert all(parts)
    most = plan.most_that_pay
    assert most is not None
    times = {
        n: ranks_plan(FACTS, WORK, schedule_, SPEED, n).seconds or 0.0 for n in (most // 2, most, 2 * most)
    }
    assert times[most] <= 0.95 * times[most // 2]
    assert times[2 * most] > 0.95 * times[most]
    assert any("20 GB/s" in text for text in plan.assumptions)
    assert any("made for ahead" in text for text in plan.assumptions)
    slower = ranks_plan(FACTS, WORK, schedule_, replace(SPEED, ranks_rate=1e9), 8)
    assert (slower.speed_up or 0) < (plan.speed_up or 0)


@pytest.mark.parametrize("samples", [10, 24, 40, 100, 128])
def test_so_many_pay_at_most_as_all_have_work(samples: int) -> None:
    """Where nothing but samples counts: more processes are refused."""
    work = replace(WORK, calibration=CalibrationConfig(samples=samples, seq_len=16384))
    fast = replace(SPEED, ranks_rate=4e11, column_seconds=1e-7)
    most = ranks_plan(FACTS, work, on_a_card(FACTS, work), fast, 2).most_that_pay
    assert most is not None
    pairs = work.paired_samples
    assert idle_ranks(pairs, samples - pairs, most) == 0 < idle_ranks(pairs, samples - pairs, 2 * most)


def test_processes_on_the_cpu_share_its_cores() -> None:
    plan = ranks_plan(FACTS, WORK, schedule(FACTS, WORK, parked=True), SPEED, 4)
    forwards = plan.phases[0]
    assert forwards.seconds == pytest.approx(forwards.alone_seconds, rel=0.02)
    assert plan.most_that_pay == 1
    assert "all processes on this machine, whose cores they share" in plan.assumptions


def test_without_rates_there_is_traffic_and_no_time() -> None:
    plan = ranks_plan(FACTS, WORK, on_a_card(FACTS, WORK), None, 8)
    assert (plan.seconds, plan.speed_up, plan.most_that_pay, plan.phases) == (None, None, None, ())
    assert plan.bytes_per_block > 0
