"""How little memory makes a strategy come to what a test wants to see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig
from gptq_cli.devices.accelerators import present_accelerators, present_devices
from gptq_cli.model.describe import model_facts
from gptq_cli.model.find import find_model
from gptq_cli.model.skeleton import open_skeleton
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.planning.cases import Work
from gptq_cli.planning.schedule import micro_batch_samples
from gptq_cli.preflight.resolve import resolve


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

    Looked for where plans change: at what the whole model needs with the share that plans keep free, with
    forwards replayed, and with neither, all with the smallest micro-batch: a wider one never changes a place.
    """
    ref = ModelRef(model=str(model))
    facts = model_facts(open_skeleton(find_model(ref), ref))
    work, budgets = Work(quantize, calibration), present_devices()
    step = max(1, facts.size_bytes // 32)
    first = DeviceMap.parse(str(present_accelerators()[0]))
    batch_size = calibration.batch_size or micro_batch_samples(work)
    smallest = Work(quantize, replace(calibration, batch_size=batch_size))
    parked = resolve(first, facts, budgets, work=smallest).devices[0].needed_bytes
    less = limits(parked - 1, count)
    replayed = resolve(first, facts, budgets, max_memory=less, work=smallest).devices[0].needed_bytes
    for top in (int(parked / 0.95), int(replayed / 0.95), replayed):
        for size in range(top + 2 * step, top - 128 * step, -step):
            given = limits(size, count)
            found = resolve(DeviceMap.parse(strategy), facts, budgets, max_memory=given, work=work)
            if found.placement is None:
                break
            if found.placement.devices == wanted:
                return given
    raise AssertionError(f"{strategy} never comes to {wanted}")
