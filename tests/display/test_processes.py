"""What several processes need and gain, as rows."""

from dataclasses import replace

from rich.console import Console

from gptq_cli.display.maps import map_summary
from gptq_cli.display.processes import gain_rows, memory_rows, phases_table
from gptq_cli.results.map import DevicePlan, HostMemory, MapReport, PhaseTime, RankMemory, RanksPlan
from tests.display.map_reports import planned

GIB = 1 << 30
PLAN = RanksPlan(
    processes=8,
    seconds=600.0,
    speed_up=3.5,
    phases=(PhaseTime(phase="forwards and Hessians", alone_seconds=1800.0, seconds=225.0),),
    most_that_pay=32,
    sum_bytes_per_block=3 * GIB,
    code_bytes_per_block=GIB,
    link_bytes_per_second=2e10,
    assumptions=("rates from a short probe of this machine", "20 GB/s from a process to the others"),
)


def device(name: str, needed: int, limit: int) -> DevicePlan:
    return DevicePlan(
        device=name,
        total_bytes=limit * GIB,
        free_bytes=limit * GIB,
        limit_bytes=limit * GIB,
        weights_bytes=needed * GIB,
        working_bytes=0,
        hessian_bytes=0,
        activation_bytes=0,
        packing_bytes=0,
        baseline_bytes=0,
    )


def rank(number: int, card: int = 80) -> RankMemory:
    plans = (device(f"cuda:{number % 2}", 41, card), device("cpu", 6, 60))
    return RankMemory(rank=number, host=f"node{number // 2}", devices=plans)


def of_ranks(*ranks: RankMemory) -> MapReport:
    hosts = (HostMemory(host="node0", processes=2, needed_bytes=12 * GIB, limit_bytes=10 * GIB),)
    return replace(planned(), ranks=ranks, hosts=hosts)


def test_ranks_that_are_alike_are_one_row_and_what_does_not_fit_is_said_in_words() -> None:
    rows = memory_rows(of_ranks(rank(0), rank(1), rank(2), rank(3, card=40)))
    assert rows == [
        ("ranks 0-2", "on 2 machines: its cuda needs 41.0 of 80.0 GiB, main memory 6.00 of 60.0 GiB"),
        (
            "rank 3",
            "on node1: its cuda needs 41.0 of 40.0 GiB, 1.00 GiB TOO MUCH, main memory 6.00 of 60.0 GiB",
        ),
        ("node0", "2 processes need 12.0 of 10.0 GiB main memory, 2.00 GiB TOO MUCH"),
    ]


def test_a_gain_names_speed_how_many_pay_traffic_and_assumptions() -> None:
    rows = gain_rows(PLAN)
    assert rows[0] == (
        "processes",
        "8 would take about 10 min 00 s, 3.5 times as fast as one; more than 32 gain less than 5 %",
    )
    assert rows[1][1] == "4.00 GiB between processes for the costliest block: sums 3.00 GiB, codes 1.00 GiB"
    with_factors = str(gain_rows(replace(PLAN, factor_bytes_per_block=GIB))[1][1])
    assert with_factors.startswith("5.00 GiB between")
    assert with_factors.endswith(", factors 1.00 GiB")
    assert [row[0] for row in rows[2:]] == ["assumed", ""]
    unknown = replace(PLAN, seconds=None, speed_up=None, most_that_pay=None, phases=())
    assert "no time is estimated" in str(gain_rows(unknown)[0][1])
    assert phases_table(unknown) is None


def test_the_report_shows_ranks_machines_and_phases() -> None:
    shown = of_ranks(rank(0), rank(1))
    assert shown.plan is not None
    shown = replace(shown, plan=replace(shown.plan, ranks=PLAN))
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(map_summary(shown))
    text = capture.get()
    assert "ranks 0-1" in text
    assert "phase, all blocks" in text
    assert "30 min 00 s 3 min 45 s" in " ".join(text.split())
    assert "8 processes" in text
