"""How little memory makes a strategy come to what a test wants to see."""

from __future__ import annotations

from math import ceil
from pathlib import Path

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig
from gptq_cli.devices.accelerators import present_accelerators, present_devices
from gptq_cli.model.describe import model_facts
from gptq_cli.model.find import find_model
from gptq_cli.model.selection import select_linears
from gptq_cli.model.skeleton import open_skeleton
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.planning.cases import Work
from gptq_cli.preflight.resolve import Resolution, resolve

KEPT_FREE = 0.05
"""The share of a device that a plan leaves where it can (planning.planner)."""


def limits(size_bytes: int, count: int) -> MaxMemory:
    """So many bytes for each of the first `count` accelerators, none for the others; half of what the cpu has
    free, which would not be used at all if it were not listed."""
    accelerators = enumerate(present_accelerators())
    free = next(budget.free_bytes for budget in present_devices() if budget.device == CPU)
    return MaxMemory(
        (*((device, size_bytes if index < count else 0) for index, device in accelerators), (CPU, free // 2))
    )


def largest_limit(
    model: Path,
    strategy: str,
    wanted: tuple[Device, ...],
    count: int,
    calibration: CalibrationConfig,
    quantize: QuantizeConfig,
) -> MaxMemory:
    """The most that each of the first `count` accelerators may have for `strategy` to come to `wanted`.

    A plan stays the same down to the size that it needs, or needs with the share that is kept free: so the
    search goes from plan to plan, and misses none.
    """
    ref = ModelRef(model=str(model))
    facts = model_facts(select_linears(open_skeleton(find_model(ref), ref), quantize))
    work, budgets = Work(quantize, calibration).on(facts), present_devices()
    size = min(budget.total_bytes for budget in budgets if budget.device.is_accelerator)
    seen: list[str] = []
    while True:
        given = limits(size, count)
        found = resolve(DeviceMap.parse(strategy), facts, budgets, max_memory=given, work=work)
        if found.placement is None:
            raise AssertionError(
                f"{strategy} never comes to {wanted}; only to {', '.join(dict.fromkeys(seen))}"
            )
        if found.placement.devices == wanted:
            return given
        seen.append("+".join(map(str, found.placement.devices)))
        size = _end_of(found, size) - 1


def _end_of(found: Resolution, size: int) -> int:
    """The least that each accelerator may have for the same plan, which was made for `size`."""
    needed = max(plan.needed_bytes for plan in found.devices if plan.device != str(CPU))
    roomy = ceil(needed / (1 - KEPT_FREE))
    return roomy if roomy <= size else needed
