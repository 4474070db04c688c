"""`--target` on the way to a checkpoint: refused before a weight is read, and nothing is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gptq_cli import jobs
from gptq_cli.config import CalibrationConfig, InspectJob, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.errors import PreflightRefused
from gptq_cli.placement.device_map import DeviceMap
from tests.e2e.commands import write_text


def test_quantize_and_inspect_map_refuse_what_a_named_reader_would(tiny_llama: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    model = ModelRef(model=str(tiny_llama))
    three_bits = QuantizeConfig(bits=3, group_size=32)
    job = QuantizeJob(
        model=model,
        out=str(tmp_path / "out"),
        quantize=three_bits,
        calibration=CalibrationConfig.of(str(text), samples=4, seq_len=32),
        targets=("vllm",),
    )
    with pytest.raises(PreflightRefused) as caught:
        jobs.quantize(job)
    (error,) = [f for f in caught.value.report.findings if f.level == "error"]
    assert (error.rule, error.hint) == ("target", "--bits 4")
    assert not (tmp_path / "out").exists()
    assert not jobs.dry_run(job).ok
    looked = InspectJob(
        model=model, device_map=DeviceMap.parse("cpu"), quantize=three_bits, targets=("vllm",)
    )
    assert not jobs.inspect_map(looked).ok


def test_a_number_of_gpus_that_cannot_share_the_result(tiny_llama: Path, tmp_path: Path) -> None:
    """4 attention heads over 3 GPUs."""
    text = write_text(tmp_path / "text.txt")
    job = QuantizeJob(
        model=ModelRef(model=str(tiny_llama), dtype="bfloat16"),
        out=str(tmp_path / "out"),
        quantize=QuantizeConfig(group_size=32),
        calibration=CalibrationConfig.of(str(text), samples=4, seq_len=32),
        targets=("vllm",),
    )
    plan = jobs.dry_run(replace(job, tp=3))
    (error,) = [f for f in plan.findings if f.level == "error"]
    assert (error.subject, error.hint) == ("--target vllm", "--tp 2")
    assert "4 attention heads do not divide over 3 ranks" in error.message
    plan = jobs.dry_run(replace(job, tp=2))
    assert plan.ok
    notes = [f.message for f in plan.findings if f.rule == "target"]
    assert notes == ["divides over 2 ranks; 2 is the most that do"]
