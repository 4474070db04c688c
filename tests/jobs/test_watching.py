"""What libraries warn of reaches the person, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptq_cli import jobs
from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.errors import OutOfDeviceMemory
from gptq_cli.events import Event, Phase, PhaseStarted, Warned, ignore
from gptq_cli.gptq import solver
from gptq_cli.gptq.walk_choice import Guarded
from gptq_cli.jobs.watching import Command, watching
from tests.e2e.commands import write_text


class Broken:
    """A kernel that cannot be compiled."""

    name = "triton"
    columns = 128

    def solve(self, run: Any, grid: Any) -> None:
        raise FileNotFoundError("no C compiler\nin any of many places")

    sweep = solve


@pytest.mark.filterwarnings("always")
def test_a_kernel_that_fails_in_every_solve_is_told_once_and_kept_in_the_report(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "walk_on", lambda device, dtype: Guarded(Broken()))
    events: list[Event] = []
    text = write_text(tmp_path / "text.txt")
    job = QuantizeJob(
        model=ModelRef(model=str(tiny("llama"))),
        out=str(tmp_path / "out"),
        quantize=QuantizeConfig(group_size=16),
        calibration=CalibrationConfig.of(str(text), samples=2, seq_len=16),
    )
    report = jobs.quantize(job, events.append)
    said = [event.message for event in events if isinstance(event, Warned) and "walk" in event.message]
    (warned,) = said
    assert warned.startswith(
        "WalkWarning: the solver's triton walk is not used: FileNotFoundError: no C compiler; "
    )
    assert warned in report.warnings
    assert {linear.method for block in report.blocks for linear in block.linears} == {"gptq"}


@pytest.mark.parametrize(
    ("command", "phases", "says", "says_not"),
    [
        ("load", ["open", "load"], "--device-map cpu", "--seq-len"),
        ("load", ["load", "generate"], "--max-new-tokens", "--against"),
        ("load", ["load", "evaluate"], "--seq-len", "--against"),
        ("load", ["load", "dense"], "leave --against out", "--seq-len"),
        ("load", [], "ulimit", "--device-map"),
        ("quantize", ["open"], "ulimit", "--samples"),
        ("quantize", ["open", "calibration", "load"], "--device-map auto with --max-memory", "--samples"),
        ("quantize", ["load", "capture"], "--samples", "--seq-len"),
        ("quantize", ["load", "capture", "save"], "ulimit", "--samples"),
        ("quantize", ["open", "verify"], "ulimit", "--samples"),
        ("quantize", ["load", "save", "verify", "upload"], "ulimit", "--samples"),
        ("quantize", ["load", "save", "evaluate"], "gptq load", "--samples"),
        ("quantize", ["load", "save", "verify", "load"], "gptq load", "--max-memory"),
    ],
)
def test_out_of_memory_names_what_the_step_uses(
    command: Command, phases: list[Phase], says: str, says_not: str
) -> None:
    with pytest.raises(OutOfDeviceMemory) as caught, watching(command, ignore) as watcher:
        for phase in phases:
            watcher(PhaseStarted(phase))
        raise MemoryError
    hint = str(caught.value.hint)
    assert says in hint
    assert says_not not in hint
