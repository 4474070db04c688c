"""Plans for real models on machines that people have, from the headers of files that are all holes."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptq_cli.config import InspectJob, ModelRef, QuantizeConfig
from gptq_cli.jobs import inspect_map
from gptq_cli.placement.device import format_size
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.placement.placement import parse_inventory
from gptq_cli.results.map import MapReport
from tests.fabricated import config_8b, config_70b, config_671b, fabricate
from tests.golden import check_golden

CASES = {
    "8b": (
        ("cuda:0=8GiB,cpu=16GiB", "balanced"),
        ("cuda:0=8GiB,cpu=16GiB", "best"),
        ("cpu=16GiB", "balanced"),
    ),
    "70b": (("cuda:0=24GiB,cpu=32GiB", "balanced"), ("cuda:0=24GiB,cpu=32GiB", "best")),
    "671b": (("cuda:0=80GiB,cpu=128GiB", "balanced"),),
}


def written(model: str, path: Path) -> Path:
    """A folder with the headers of a model."""
    if model == "671b":
        return fabricate(config_671b(), path, fp8=True, shards=8)
    return fabricate({"8b": config_8b, "70b": config_70b}[model](), path)


def lines(made: MapReport) -> list[str]:
    """What a person would look at."""
    found = [made.verdict, *(f"{f.level} {f.rule}" for f in made.findings), made.reason, *made.streaming]
    for plan in made.devices:
        parts = ", ".join(f"{word} {format_size(size)}" for word, size in plan.parts if size)
        found.append(
            f"{plan.device} {format_size(plan.needed_bytes)} of {format_size(plan.limit_bytes)}: {parts}"
        )
    return found


@pytest.mark.parametrize("model", CASES)
def test_plans_for_real_models(model: str, tmp_path: Path) -> None:
    """Each fits with room to spare, without offload, on cards that hold a part of the model."""
    folder = written(model, tmp_path / "model")
    shown: list[str] = []
    for machine, recipe in CASES[model]:
        made = inspect_map(
            InspectJob(
                model=ModelRef(model=str(folder)),
                device_map=DeviceMap.parse("auto"),
                devices=parse_inventory(machine),
                quantize=QuantizeConfig.of(recipe),  # type: ignore[arg-type]
            )
        )
        assert made.verdict == "fits", made.findings
        assert all(plan.needed_bytes <= 0.95 * plan.limit_bytes for plan in made.devices)
        shown += [f"{model}, {recipe}, {machine}", *(f"    {line}" for line in lines(made)), ""]
    check_golden(f"plans-{model}.txt", "\n".join(shown))
