"""The plots of a run: loss by linear and by block, memory and time beside what was predicted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gptq_cli.display import format as fmt
from gptq_cli.report.style import BAD, BASELINE, COLOURS
from gptq_cli.report.svg import POINTS, Plot, Series
from gptq_cli.results.run import BlockReport, LinearReport, RunReport, finite_mean
from gptq_cli.wording import number_of

LOSS_EXPLAINED = (
    "The loss of a linear is the share of its output's energy that is lost, measured on the calibration text."
)
HEAD = "head"
"""The place of the output head, behind the blocks."""
MOST_KINDS = 12
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def kind_of(linear: LinearReport, block: str) -> str:
    """What a linear is in its block: `mlp.down_proj`; for each of many experts `mlp.experts.*.up_proj`."""
    return _NUMBER.sub("*", linear.name.removeprefix(f"{block}."))


def block_names(blocks: Sequence[BlockReport]) -> list[str]:
    """The number of each block, or its name."""
    return [block.name.rpartition(".")[2] for block in blocks]


def loss_per_block(report: RunReport) -> Plot:
    """The mean loss of each block beside that of round-to-nearest."""
    ours = tuple(finite_mean(x.loss for x in block.linears) for block in report.blocks)
    nearest = tuple(finite_mean(x.rtn_loss for x in block.linears) for block in report.blocks)
    return Plot(
        title="Mean loss of each block",
        description="Mean relative loss of the linears of each block, GPTQ against round-to-nearest. "
        + _extremes(report.blocks, ours),
        series=(
            Series(name="GPTQ", values=ours, mark="line", style=COLOURS[0]),
            Series(name="round-to-nearest", values=nearest, mark="dashes", style=BASELINE),
        ),
        x_names=block_names(report.blocks),
        unit=number,
    )


def _extremes(blocks: Sequence[BlockReport], means: Sequence[float | None]) -> str:
    known = [(value, block.name) for block, value in zip(blocks, means, strict=True) if value is not None]
    if not known:
        return "No loss is known."
    (least, best), (most, worst) = min(known), max(known)
    return f"From {fmt.loss(least)} in {best} to {fmt.loss(most)} in {worst}."


def loss_per_linear(report: RunReport) -> Plot:
    """Every linear of every block, coloured by what it is there; experts of a block as their mean."""
    cells = _by_kind(report)
    kinds = list(dict.fromkeys(kind for place in cells for kind in place))
    together = _few(kinds)
    series = []
    for index, (name, members) in enumerate(together.items()):
        found = [[x for kind in members for x in place.get(kind, ())] for place in cells]
        series.append(
            Series(
                name=name,
                values=tuple(finite_mean(x.loss for x in linears) for linears in found),
                labels=tuple(_tooltip(linears) for linears in found),
                mark=POINTS[index % len(POINTS)],
                style=COLOURS[index % len(COLOURS)],
                joined=True,
            )
        )
    failed = [[x for linears in place.values() for x in linears if x.method != "gptq"] for place in cells]
    if any(failed):
        values = tuple(finite_mean(x.loss for x in linears) for linears in failed)
        labels = tuple(_tooltip(linears) for linears in failed)
        series.append(Series(name="fallback", values=values, labels=labels, mark="ring", style=BAD))
    linears = report.linears
    better = sum(1 for x in linears if x.loss < x.rtn_loss)
    return Plot(
        title="Loss of each linear",
        description=f"{better} of {number_of(len(linears), 'linear')} have a lower loss than "
        "round-to-nearest. The axis of the loss is logarithmic.",
        series=series,
        x_names=[*block_names(report.blocks), *([HEAD] if report.head is not None else [])],
        unit=number,
        log=True,
    )


def _by_kind(report: RunReport) -> list[Mapping[str, list[LinearReport]]]:
    """The linears of each block by what they are, then the head."""
    places: list[Mapping[str, list[LinearReport]]] = []
    for block in report.blocks:
        held: dict[str, list[LinearReport]] = {}
        for linear in block.linears:
            held.setdefault(kind_of(linear, block.name), []).append(linear)
        places.append(held)
    return [*places, {report.head.name: [report.head]}] if report.head is not None else places


def _few(kinds: Sequence[str]) -> dict[str, Sequence[str]]:
    """Kinds by the name of their series: the last part of theirs where that tells them apart. Where there are
    more than can be told apart, the last ones are one series."""
    shown, rest = kinds, kinds[:0]
    if len(kinds) > MOST_KINDS:
        shown, rest = kinds[: MOST_KINDS - 1], kinds[MOST_KINDS - 1 :]
    short = [kind.rpartition(".")[2] for kind in shown]
    unique = len(set(short)) == len(short)
    named: dict[str, Sequence[str]] = {
        (name if unique else kind): (kind,) for name, kind in zip(short, shown, strict=True)
    }
    return {**named, f"{len(rest)} other kinds": rest} if rest else named


def _tooltip(linears: Sequence[LinearReport]) -> str:
    if not linears:
        return ""
    ours, nearest = finite_mean(x.loss for x in linears), finite_mean(x.rtn_loss for x in linears)
    if ours is None or nearest is None:
        return linears[0].name
    failed = [x.method for x in linears if x.method != "gptq"]
    how = f", FALLBACK {failed[0]}" if failed else ""
    name = linears[0].name if len(linears) == 1 else f"{linears[0].name} and {len(linears) - 1} more, mean"
    return f"{name}: {fmt.loss(ours)}, round-to-nearest {fmt.loss(nearest)}{how}"


def memory_per_block(report: RunReport) -> Plot:
    """The peak on each device, and what was predicted for the whole run."""
    devices = list(dict.fromkeys(device for block in report.blocks for device, _ in block.peak_bytes))
    predicted = dict(report.predicted_peak_bytes)
    shown = [size for block in report.blocks for _, size in block.peak_bytes]
    shown += [predicted[device] for device in devices if device in predicted]
    base, unit = (2**30, "GiB") if max(shown, default=0) >= 2**30 else (2**20, "MiB")
    series = []
    for index, device in enumerate(devices):
        held = [dict(block.peak_bytes).get(device) for block in report.blocks]
        values = tuple(None if value is None else value / base for value in held)
        style = COLOURS[index % len(COLOURS)]
        series.append(Series(name=device, values=values, mark="line", style=style))
        if device in predicted:
            flat = (predicted[device] / base,) * len(report.blocks)
            series.append(Series(name=f"{device} predicted", values=flat, mark="dashes", style=style))
    return Plot(
        title="Peak memory of each block",
        description="The most that was allocated on each device while a block was quantized, and the "
        "prediction for the whole run.",
        series=series,
        x_names=block_names(report.blocks),
        unit=lambda value: f"{value:.3g} {unit}",
    )


def seconds_per_block(report: RunReport) -> Plot:
    """The time of each block, beside the estimate where one was made."""
    seconds = [block.seconds for block in report.blocks]
    predicted = dict(report.predicted_block_seconds)
    estimates = [predicted.get(block.name) for block in report.blocks]
    most = max([*seconds, *(value for value in estimates if value is not None)], default=0.0)
    base, unit = (60.0, "min") if most >= 180 else (1.0, "s")
    measured = Series(
        name="measured",
        values=tuple(value / base for value in seconds),
        labels=tuple(f"{block.name}: {fmt.duration(block.seconds)}" for block in report.blocks),
        mark="bar",
        style=COLOURS[0],
    )
    series = [measured]
    if predicted:
        values = tuple(None if value is None else value / base for value in estimates)
        series.append(Series(name="estimate", values=values, mark="dashes", style=COLOURS[3]))
    return Plot(
        title="Time of each block",
        description=f"{fmt.duration(sum(seconds))} in all"
        + (f", estimated {fmt.duration(sum(predicted.values()))}." if predicted else "."),
        series=series,
        x_names=block_names(report.blocks),
        unit=lambda value: f"{value:g} {unit}",
    )


def number(value: float) -> str:
    """Of an axis of losses."""
    return f"{value:.3g}"
