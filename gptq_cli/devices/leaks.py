"""Detecting memory that grows from block to block.

After a block's flush an accelerator should hold as much as after the block before: its resident weights and
the hidden states of the samples. If it holds more every time, something keeps tensors alive, and a long run
will run out of memory. The CPU is not checked: its resident set also grows as pages are first touched.
"""

from __future__ import annotations

from collections.abc import Iterable

from gptq_cli.events import DeviceMemory
from gptq_cli.placement.device import format_size

MIN_GROWTH_BYTES = 1 << 20
BLOCKS_IN_A_ROW = 4
"""Consecutive growths after which a leak is reported."""


class LeakWatch:
    """Checks the memory after each block's flush; reports once per device."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._growths: dict[str, list[int]] = {}
        self._reported: set[str] = set()

    def check(self, after: Iterable[DeviceMemory]) -> tuple[str, ...]:
        """Add the readings after a flush; returns one sentence for each device newly found to leak."""
        found = []
        for memory in after:
            if memory.device == "cpu":
                continue
            growth = memory.allocated_bytes - self._last.get(memory.device, memory.allocated_bytes)
            self._last[memory.device] = memory.allocated_bytes
            growths = self._growths.setdefault(memory.device, [])
            growths.append(growth)
            if growth < MIN_GROWTH_BYTES:
                growths.clear()
            if len(growths) >= BLOCKS_IN_A_ROW and memory.device not in self._reported:
                self._reported.add(memory.device)
                mean = format_size(sum(growths) // len(growths))
                found.append(
                    f"memory of {memory.device} grows by {mean} per block, "
                    f"{len(growths)} blocks in a row; {format_size(memory.allocated_bytes)} are in use now"
                )
        return tuple(found)
