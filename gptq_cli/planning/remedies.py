"""What would make a job fit: candidate changes, cheapest first, each tried before it is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gptq_cli.placement.device import CPU, Device, format_size
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.placement.placement import DeviceBudget
from gptq_cli.planning.cases import MapCase

GIB = 1 << 30
NAMED = 3
"""Remedies of a hint, at most."""
Fits = Callable[[MapCase], bool]


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change that makes the job fit, as a flag to paste where there is one, and its price."""

    change: str
    price: str

    def __str__(self) -> str:
        return f"{self.change} ({self.price})"


def alternatives(remedies: tuple[Remedy, ...]) -> str:
    """`one; or two; or three`: the form of a hint with a choice, see `findings.Finding.hint`."""
    return "; or ".join(str(remedy) for remedy in remedies)


def less_work(case: MapCase, fits: Fits) -> Remedy | None:
    """The first way of asking for less work that fits."""
    return next((remedy for remedy, changed in _less_work(case) if fits(changed)), None)


def cheapest(case: MapCase, fits: Fits) -> tuple[Remedy, ...]:
    """The first `NAMED` candidates that fit."""
    found: list[Remedy] = []
    for remedy, changed in _candidates(case):
        more_than_needed = any(remedy.change.startswith(f"{one.change} ") for one in found)
        if not more_than_needed and fits(changed):
            found.append(remedy)
            if len(found) == NAMED:
                break
    if len(found) < NAMED:
        found += _more_memory(case, fits)[: NAMED - len(found)]
    return tuple(found)


def _candidates(case: MapCase) -> Iterator[tuple[Remedy, MapCase]]:
    """Changes in order of price: free ones, less data, less precision, less speed."""
    if case.max_memory is not None:
        yield Remedy("leave --max-memory out", "uses all free memory"), replace(case, max_memory=None)
        if case.unlisted:
            left = [budget.device for budget in case.unlisted]
            wider = case.with_unlisted(left)
            price = f"uses {' and '.join(map(str, left))}, too"
            yield Remedy(f'--max-memory "{wider}"', price), replace(case, max_memory=wider)
    if case.spec.strategy != "auto":
        yield Remedy("--device-map auto", "our own plan"), replace(case, spec=DeviceMap(strategy="auto"))
    if not case.given and any(b.free_bytes < 0.9 * b.total_bytes for b in case.budgets):
        freed = tuple(replace(b, free_bytes=b.total_bytes) for b in case.budgets)
        sharing = {CPU: _on_each_machine(case)}
        used = ", ".join(
            f"{format_size(sharing.get(b.device, 1) * (b.total_bytes - b.free_bytes))} on {b.device}"
            for b in case.budgets
            if b.free_bytes < b.total_bytes
        )
        yield Remedy(f"end other processes ({used} in use)", "nothing else"), replace(case, budgets=freed)
    yield from _other_processes(case)
    yield from _less_work(case)
    if case.facts.dtype == "float32" and case.work is not None:
        facts = replace(
            case.facts,
            dtype="bfloat16",
            tensors=tuple(replace(t, size_bytes=t.elements * 2) for t in case.facts.tensors),
        )
        yield (
            Remedy("--dtype bfloat16", "half the memory of weights, rounded to 8 bits"),
            replace(case, facts=facts),
        )
    if case.accelerators and case.cpu_room is not None:
        changed = replace(case, spec=DeviceMap.parse("cpu"))
        yield Remedy("--device-map cpu", "no accelerator: many times slower"), changed


def _on_each_machine(case: MapCase) -> int:
    """Processes that share main memory."""
    return max((place.processes for place in case.places), default=1)


def _other_processes(case: MapCase) -> Iterator[tuple[Remedy, MapCase]]:
    """Fewer on each machine, which then have more main memory; or more machines, and a smaller share each."""
    ranks = len(case.places)
    if ranks < 2 or case.work is None:
        return
    on_each = _on_each_machine(case)
    fewer = on_each // 2
    while fewer:
        budgets = tuple(
            replace(
                b, total_bytes=b.total_bytes * on_each // fewer, free_bytes=b.free_bytes * on_each // fewer
            )
            if b.device == CPU
            else b
            for b in case.budgets
        )
        left = tuple(replace(p, processes=fewer) for p in case.places[: max(1, ranks * fewer // on_each)])
        work = replace(case.work, ranks=len(left))
        change = f"{fewer} process{'es' if fewer > 1 else ''} on each machine instead of {on_each}"
        price = "more main memory for each, slower"
        yield Remedy(change, price), replace(case, budgets=budgets, work=work, places=left)
        fewer //= 2
    if case.accelerators:
        work = replace(case.work, ranks=2 * ranks)
        change = f"{2 * ranks} processes on twice as many machines"
        yield Remedy(change, "a smaller share of the samples for each"), replace(case, work=work)


def _less_work(case: MapCase) -> Iterator[tuple[Remedy, MapCase]]:
    work = case.work
    if work is None:
        return
    data = work.calibration
    also = ""
    if work.quantize.solve_for == "dense":
        also = "--solve-for own "
        smaller = replace(work, quantize=replace(work.quantize, solve_for="own"))
        yield Remedy("--solve-for own", "less accurate"), replace(case, work=smaller)
        work = smaller
    if data.batch_size is None or data.batch_size > 1:
        smaller = replace(work, calibration=replace(data, batch_size=1))
        yield Remedy(f"{also}--batch-size 1", "a little slower"), replace(case, work=smaller)
    for samples in (data.samples // 2, data.samples // 4):
        if samples >= 32:
            smaller = replace(work, calibration=replace(data, samples=samples, batch_size=1))
            price = f"{samples} instead of {data.samples} windows of calibration text"
            yield Remedy(f"{also}--samples {samples} --batch-size 1", price), replace(case, work=smaller)
    for seq_len in (data.seq_len // 2, data.seq_len // 4):
        if seq_len >= 512:
            smaller = replace(work, calibration=replace(data, seq_len=seq_len, batch_size=1))
            price = f"windows of {seq_len} instead of {data.seq_len} tokens"
            yield Remedy(f"{also}--seq-len {seq_len} --batch-size 1", price), replace(case, work=smaller)


def _larger_card(case: MapCase, fits: Fits) -> list[Remedy]:
    """The smallest usual card that would do in the place of the present ones."""
    kind = case.accelerators[0].kind
    present = max(case.limit(device) or 0 for device in case.accelerators)
    others = tuple(budget for budget in case.budgets if not budget.device.is_accelerator)
    for size in (16, 24, 32, 48, 80, 96, 141, 192, 288):
        card = DeviceBudget(Device(kind, 0), size * GIB, size * GIB)
        if size * GIB > present and fits(replace(case, budgets=(card, *others))):
            return [Remedy(f"one accelerator of {size} GiB", "instead of the present ones")]
    return []


def _more_memory(case: MapCase, fits: Fits) -> list[Remedy]:
    """How much more main memory, or how many more of the largest accelerator, would do."""
    found: list[Remedy] = []
    base = replace(case, max_memory=None, spec=DeviceMap(strategy="auto"))
    if fits(base):  # there is enough: it may only not be used
        return found
    cpu = case.limit(CPU) or 0
    for more in (8, 16, 32, 64, 128, 256, 512, 1024):
        budgets = tuple(b for b in case.budgets if b.device != CPU)
        sharing = _on_each_machine(case)
        size = cpu + more * GIB // sharing
        if fits(replace(base, budgets=(*budgets, DeviceBudget(CPU, size, size)))):
            free = format_size(sharing * cpu + more * GIB)
            found.append(Remedy(f"{more} GiB more main memory", f"a machine with {free} free"))
            break
    if case.accelerators:
        found += _larger_card(base, fits)
    if case.accelerators and not case.places:  # a process of a launch has one of its own
        largest = max(case.accelerators, key=lambda d: case.limit(d) or 0)
        size = case.limit(largest) or 0
        for more in (1, 3, 7):
            extra = tuple(
                DeviceBudget(Device(largest.kind, 100 + index), size, size)
                for index in range(more if largest.index is not None else 0)
            )
            if extra and fits(replace(base, budgets=(*case.budgets, *extra))):
                cards = "one more accelerator" if more == 1 else f"{more} more accelerators"
                found.append(Remedy(cards, f"of {format_size(size)} each"))
                break
    return found
