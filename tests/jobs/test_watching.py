"""What libraries warn of reaches the person, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptq_cli import jobs
from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.engine.run import _tried_again
from gptq_cli.errors import OutOfDeviceMemory
from gptq_cli.events import Event, Phase, PhaseStarted, Warned, ignore
from gptq_cli.gptq import solver
from gptq_cli.gptq.walk_choice import Guarded
from gptq_cli.jobs.less_memory import Command
from gptq_cli.jobs.watching import watching
from gptq_cli.load_job import LoadJob
from gptq_cli.placement.device import CPU
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import Schedule
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


def quantize_job(samples: int = 128, batch_size: int | None = None, device_map: str = "auto") -> QuantizeJob:
    return QuantizeJob(
        model=ModelRef(model="m"),
        out="q",
        quantize=QuantizeConfig(fisher_tokens=64, tune_epochs=1),
        calibration=CalibrationConfig(samples=samples, batch_size=batch_size),
        device_map=DeviceMap.parse(device_map),
    )


def hint_of(command: Command, phases: list[Phase], job: QuantizeJob | LoadJob | None, **known: object) -> str:
    """What is proposed where memory runs out in the last of `phases`."""
    with pytest.raises(OutOfDeviceMemory) as caught, watching(command, ignore, job) as watcher:
        for phase in phases:
            watcher(PhaseStarted(phase))
        for name, value in known.items():
            setattr(watcher, name, value)
        raise MemoryError
    return str(caught.value.hint)


LOAD = LoadJob(path="q", prompt="a", against="m", evaluate="t", max_new_tokens=64, seq_len=512)


@pytest.mark.parametrize(
    ("command", "phases", "says", "says_not"),
    [
        ("load", ["open", "load"], "--device-map cpu", "--seq-len"),
        ("load", ["load", "generate"], "--max-new-tokens 32", "--against"),
        ("load", ["load", "evaluate"], "--seq-len 256", "--against"),
        ("load", ["load", "dense"], "leave --against out", "--seq-len"),
        ("load", [], "ulimit", "--device-map"),
        ("load", ["open", "download"], "ulimit", "--device-map"),
        ("inspect-map", ["open"], "no weight is read here", "--device-map"),
        ("quantize", ["download"], "ulimit", "--max-memory"),
        ("quantize", ["open"], "ulimit", "--samples"),
        ("quantize", ["open", "calibration"], "--samples 64", "--batch-size"),
        ("quantize", ["open", "calibration", "load"], "--device-map auto with --max-memory", "--samples"),
        ("quantize", ["load", "capture"], "--samples 64", "--seq-len"),
        ("quantize", ["load", "gradients"], "--fisher-tokens 0", "--tune-epochs"),
        ("quantize", ["capture", "tune"], "--tune-epochs 0", "--fisher-tokens"),
        ("quantize", ["capture", "save"], "ulimit", "--samples"),
        ("quantize", ["open", "verify"], "ulimit", "--samples"),
        ("quantize", ["load", "save", "verify", "upload"], "ulimit", "--samples"),
        ("quantize", ["load", "save", "evaluate"], "gptq load", "--samples"),
        ("quantize", ["load", "save", "verify", "load"], "gptq load", "--max-memory"),
    ],
)
def test_out_of_memory_names_what_the_step_uses(
    command: Command, phases: list[Phase], says: str, says_not: str
) -> None:
    hint = hint_of(command, phases, {"load": LOAD, "quantize": quantize_job()}.get(command))
    assert says in hint
    assert says_not not in hint


@pytest.mark.parametrize(
    ("job", "known", "says", "says_not"),
    [
        (quantize_job(batch_size=4), {}, "--batch-size 2", ""),
        (quantize_job(batch_size=5), {"micro_batch": 8}, "--batch-size 4", ""),
        (quantize_job(batch_size=1), {}, "--samples 64", "--batch-size"),
        (quantize_job(batch_size=4), {"micro_batch": 1}, "--samples 64", "--batch-size"),
        (quantize_job(), {}, "--samples 64", "--batch-size"),
        (quantize_job(samples=3), {}, "--samples 1", ""),
        (quantize_job(samples=1), {}, "--max-memory", "--samples"),
        (quantize_job(), {"kept": True}, "--samples 64 --resume never (the work begins anew)", ""),
        (quantize_job(device_map="cpu"), {}, "free memory on this machine", "--device-map"),
        (quantize_job(), {"on_cpu": True}, "free memory on this machine", "--device-map"),
        (replace(LOAD, max_new_tokens=1), {}, "shorten the prompt", "--max-new-tokens"),
        (replace(LOAD, device_map=DeviceMap.parse("auto")), {}, "--device-map cpu", "--device-map auto"),
        (replace(LOAD, device_map=DeviceMap.parse("cpu")), {}, "free memory", "--device-map"),
        (LOAD, {"on_cpu": True}, "free memory on this machine", "--device-map"),
    ],
)
def test_out_of_memory_proposes_less_than_is_in_use(
    job: QuantizeJob | LoadJob, known: dict[str, Any], says: str, says_not: str
) -> None:
    command, phase = ("load", "generate") if isinstance(job, LoadJob) else ("quantize", "capture")
    hint = hint_of(command, [phase], job, **known)  # type: ignore[arg-type, list-item]
    assert says in hint
    assert not says_not or says_not not in hint


@pytest.mark.parametrize(
    ("phase", "option"), [("tune", "--tune-epochs 0"), ("gradients", "--fisher-tokens 0")]
)
def test_what_changes_codes_does_not_go_on_with_finished_blocks(phase: Phase, option: str) -> None:
    for kept, ends in ((False, ";"), (True, " --resume never (the work begins anew);")):
        assert f"{option}{ends}" in hint_of("quantize", [phase], quantize_job(), kept=kept)


def test_evaluation_in_the_shortest_windows_proposes_no_shorter_ones() -> None:
    assert "--seq-len" not in hint_of("load", ["evaluate"], replace(LOAD, seq_len=2))


def test_a_run_alone_has_tried_one_sample_at_a_time() -> None:
    """The engine gives up only after that; several ranks would all have to, so they do not try."""
    placement = Placement((), CPU, "")
    schedule = Schedule(micro_batch_samples=4, seq_len=8, blocks=())
    for ranks, proposed in ((1, False), (2, True)):
        with pytest.raises(OutOfDeviceMemory) as caught, watching("quantize", ignore, quantize_job()) as one:
            one.planned(placement, schedule, ranks)
            one(PhaseStarted("capture"))
            raise MemoryError
        assert ("--batch-size 2" in str(caught.value.hint)) == proposed


@pytest.mark.parametrize(
    ("before", "now", "hint"),
    [
        (8, 2, "--batch-size 2 (from the start); or give the work more room"),
        (4, 4, "--batch-size 2 (from the start); or give the work more room"),
        (4, 1, "--batch-size 1 (from the start); or give the work more room"),
        (1, 1, "give the work more room"),
    ],
)
def test_a_block_that_is_tried_again_proposes_a_batch_size_that_is_smaller(
    before: int, now: int, hint: str
) -> None:
    made = [Schedule(micro_batch_samples=samples, seq_len=8, blocks=()) for samples in (before, now)]
    warned = _tried_again("no room", "less", *made)
    assert warned.hint.startswith(hint)
    assert ("codes may differ" in warned.message) == (before != now)
