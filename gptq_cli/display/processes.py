"""What several processes would need and gain, as the map report tells it.

processes  8 would take about 25 min, 6.3 times as fast as one; more than 32 gain less than 5 %
ranks 0-7  on node1: its cuda needs 41.2 of 79.1 GiB, main memory 6.21 of 62.9 GiB
node1      8 processes need 49.6 of 503 GiB main memory

phase                      1 process   8 processes
forwards and Hessians  1 h 30 min  11 min 15 s
"""

from __future__ import annotations

from itertools import groupby

from rich.console import RenderableType
from rich.table import Table

from gptq_cli.display import format as fmt
from gptq_cli.display.tables import listed
from gptq_cli.results.map import DevicePlan, HostMemory, MapReport, RankMemory, RanksPlan
from gptq_cli.wording import number_of


def memory_rows(report: MapReport) -> list[tuple[str, RenderableType]]:
    """The devices of every rank, those in a row that need and have the same as one; and the machines."""
    found: list[tuple[str, RenderableType]] = []
    for text, alike in groupby(report.ranks, _rank_text):
        ranks = list(alike)
        first, last = ranks[0], ranks[-1]
        numbers = f"{first.rank}" if first is last else f"{first.rank}-{last.rank}"
        hosts = list(dict.fromkeys(rank.host for rank in ranks))
        where = hosts[0] if len(hosts) == 1 else f"{len(hosts)} machines"
        label = "rank" if first is last else "ranks"
        found.append((f"{label} {numbers}", f"on {where}: {text}"))
    return found + [(host.host, _host_text(host)) for host in report.hosts]


def _rank_text(rank: RankMemory) -> str:
    """`cuda needs 41.2 of 79.1 GiB, main memory 6.21 of 62.9 GiB`; of which number the device is says the
    rank."""
    return ", ".join(f"{_device_words(plan)} {_figures(plan)}" for plan in rank.devices)


def _device_words(plan: DevicePlan) -> str:
    return "main memory" if plan.device == "cpu" else f"its {plan.device.partition(':')[0]} needs"


def _figures(plan: DevicePlan) -> str:
    lack = "" if plan.fits else f", {fmt.size(-plan.spare_bytes)} TOO MUCH"
    return f"{fmt.gib(plan.needed_bytes)} of {fmt.gib(plan.limit_bytes)} GiB{lack}"


def _host_text(host: HostMemory) -> str:
    need = f"{fmt.gib(host.needed_bytes)} of {fmt.gib(host.limit_bytes)} GiB main memory"
    lack = "" if host.fits else f", {fmt.size(host.needed_bytes - host.limit_bytes)} TOO MUCH"
    return f"{number_of(host.processes, 'process', 'needs', 'need')} {need}{lack}"


def gain_rows(plan: RanksPlan) -> list[tuple[str, RenderableType]]:
    """How fast, up to how many pay, what travels, and what that assumes."""
    factors = f", factors {fmt.size(plan.factor_bytes_per_block)}" if plan.factor_bytes_per_block else ""
    travels = (
        f"{fmt.size(plan.bytes_per_block)} between processes for the costliest block: sums "
        f"{fmt.size(plan.sum_bytes_per_block)}, codes {fmt.size(plan.code_bytes_per_block)}{factors}"
    )
    if plan.seconds is None or plan.speed_up is None or plan.most_that_pay is None:
        slow = "no time is estimated: name a card, as in --devices cuda:0=24GiB@4090"
        return [("processes", f"{plan.processes}; {slow}"), ("traffic", travels)]
    gain = f"{plan.speed_up:.1f} times as fast as one"
    pay = f"more than {plan.most_that_pay} gain less than 5 %"
    return [
        ("processes", f"{plan.processes} would take about {fmt.duration(plan.seconds)}, {gain}; {pay}"),
        ("traffic", travels),
        *listed("assumed", plan.assumptions),
    ]


def phases_table(plan: RanksPlan) -> Table | None:
    """Seconds of each phase, by one process and by all; None where no time is known."""
    if not plan.phases:
        return None
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    alone, together = (number_of(number, "process") for number in (1, plan.processes))
    table.add_row(" phase, all blocks", alone, together, style="bold")
    for one in plan.phases:
        table.add_row(f" {one.phase}", fmt.duration(one.alone_seconds), fmt.duration(one.seconds))
    return table
