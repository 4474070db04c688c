"""The first block against the plan: a surprise at the start rather than after hours.

The first block's peak is compared with the plan, and its time, where it is long enough for a short probe of
the machine to cost little beside it. More than `TOLERANCE` above the plan is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from gptq_cli.devices.host_memory import resident_bytes
from gptq_cli.events import BlockFinished, DeviceMemory, Event, Observer, Warned
from gptq_cli.jobs.less_memory import ANEW, half
from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import Device, format_size
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.memory import cpu_baseline_bytes
from gptq_cli.planning.rates import MachineRates, measure
from gptq_cli.planning.time import block_seconds, gradient_seconds, tuning_seconds
from gptq_cli.results.map import DevicePlan
from gptq_cli.results.run import BlockReport
from gptq_cli.wording import duration_words

TOLERANCE = 0.2
PROBE_FROM_SECONDS = 10.0
"""A first block that takes less is not worth two seconds of probing."""
NOISE_BYTES = 256 << 20
"""What a peak may be above the plan of a small model: libraries differ by as much."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What was planned for a run."""

    facts: ModelFacts
    work: Work
    schedule: Schedule
    device: Device
    """The device that works."""
    plans: Sequence[DevicePlan]
    before_bytes: int = field(default_factory=resident_bytes)
    """What the process held when the run began: in a notebook more than the libraries that a plan counts."""

    @cached_property
    def speed(self) -> MachineRates:
        """From a short probe of the device, when it is first asked for."""
        return measure(self.device, self.facts.dtype, self.work.quantize)

    def seconds(self, work: Work | None = None) -> dict[str, float]:
        """Seconds of each block; with `work` instead of what was planned."""
        return block_seconds(self.facts, work or self.work, self.schedule, self.speed)

    def gradient_seconds(self) -> float:
        """Of the gradients that are taken before the blocks."""
        return gradient_seconds(self.facts, self.work, self.speed)

    def tuning_seconds(self) -> float:
        """Of tuning when all blocks are done."""
        return tuning_seconds(self.facts, self.work, self.speed)

    def memory_warnings(self, memory: Sequence[DeviceMemory]) -> list[Warned]:
        """What took more memory than planned."""
        planned = {plan.device: plan.predicted_peak_bytes for plan in self.plans}
        others_on_cpu = max(0, self.before_bytes - cpu_baseline_bytes(self.facts))
        found = []
        for entry in memory:
            if (plan := planned.get(entry.device)) is None:
                continue
            peak = entry.peak_bytes - (others_on_cpu if entry.device == "cpu" else 0)
            if peak > (1 + TOLERANCE) * plan and peak - plan > NOISE_BYTES:
                found.append(
                    Warned(
                        f"the first block took {format_size(peak)} on {entry.device}, {format_size(plan)} "
                        f"were planned ({peak / plan - 1:.0%} more)",
                        self._less_memory(),
                    )
                )
        return found

    def _less_memory(self) -> str:
        """For a larger block; what cannot be less is not named. By then a block is kept."""
        batch = half(self.schedule.micro_batch_samples)
        fewer = (f"--batch-size {batch}",) if batch is not None else ()
        named = " or ".join((*fewer, *self._fewer_samples()))
        return f"a larger block may not fit{f': {named} takes less' if named else ''}"

    def _less_time(self) -> str:
        return "".join(f"; {option} takes less" for option in self._fewer_samples())

    def _fewer_samples(self) -> Iterator[str]:
        data = self.work.calibration
        samples = half(data.samples, len(data.sources))
        if samples is not None:
            yield f"--samples {samples}{ANEW}"

    def time_warnings(self, done: BlockReport, blocks_left: Sequence[str]) -> list[Warned]:
        """Whether the block took longer than planned, and what that means for the others."""
        planned = self.seconds()
        plan = planned.get(done.name, 0.0)
        if not plan or done.seconds <= (1 + TOLERANCE) * plan:
            return []
        slower = done.seconds / plan
        left = slower * sum(planned.get(name, 0.0) for name in blocks_left)
        return [
            Warned(
                f"the first block took {duration_words(done.seconds)}, {duration_words(plan)} were planned "
                f"({slower - 1:.0%} more): the other blocks will take about {duration_words(left)}",
                f"other work on this machine, or a slow disk, may be why{self._less_time()}",
            )
        ]


def against_plan(forecast: Forecast, observer: Observer) -> Callable[[Event], None]:
    """An observer that passes every event on, and warns once, after the first block that is finished."""
    pending = [forecast]

    def observe(event: Event) -> None:
        observer(event)
        if isinstance(event, BlockFinished) and pending:
            plan = pending.pop()
            warnings = plan.memory_warnings(event.memory)
            if event.report.seconds >= PROBE_FROM_SECONDS:
                names = [block.name for block in plan.schedule.blocks]
                warnings += plan.time_warnings(event.report, names[event.index + 1 :])
            for warned in warnings:
                observer(warned)

    return observe
