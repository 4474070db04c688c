"""`--target` on the way to a checkpoint: refused before a weight is read, and nothing is written."""

from __future__ import annotations

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
        calibration=CalibrationConfig(source=str(text), samples=4, seq_len=32),
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
