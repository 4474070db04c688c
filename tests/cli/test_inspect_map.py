"""`gptq inspect-map`: the job that the words make, and what is shown for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptq_cli.config import CalibrationConfig, InspectJob, ModelRef, QuantizeConfig
from gptq_cli.events import FindingRaised, Observer, PhaseStarted
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.placement.placement import parse_inventory
from tests.cli.conftest import FakeJobs, Run
from tests.display.events import DENSE, OFFLOAD
from tests.display.map_reports import refused


def test_defaults_are_those_of_the_configuration(jobs: FakeJobs, run: Run) -> None:
    assert run("inspect-map", "M").code == 0
    assert jobs.called == "inspect_map"
    assert jobs.job == InspectJob(model=ModelRef(model="M"), device_map=DeviceMap.parse("auto"))


def test_every_option_reaches_the_job(jobs: FakeJobs, run: Run) -> None:
    words = (
        "inspect-map M --device-map rest=cpu,lm_head=0 --max-memory 0=20GiB --devices cuda:0=24GiB,cpu=1TB "
        "--bits 8 --group-size 64 --asym --desc-act --no-true-sequential --samples 9 --seq-len 77 "
        "--batch-size 3 --dtype float32 --revision v1 --trust-remote-code --target vllm --tp 2 "
        "--recipe best --solve-for own"
    )
    outcome = run(*words.split())
    assert outcome.code == 0, outcome.err
    assert jobs.job == InspectJob(
        model=ModelRef(model="M", revision="v1", trust_remote_code=True, dtype="float32"),
        device_map=DeviceMap.parse("rest=cpu,lm_head=0"),
        max_memory=MaxMemory.parse("0=20GiB"),
        devices=parse_inventory("cuda:0=24GiB,cpu=1TB"),
        quantize=QuantizeConfig(
            bits=8,
            group_size=64,
            sym=False,
            desc_act=True,
            true_sequential=False,
            sweeps=4,
            solve_for="own",
            dense_share=1.0,
        ),
        calibration=CalibrationConfig(samples=9, seq_len=77, batch_size=3),
        targets=("vllm",),
        tp=2,
        asked=frozenset({"bits", "group_size", "sym", "desc_act"}),
    )


def test_what_a_checkpoint_would_hold_is_judged_where_it_was_asked_for(
    jobs: FakeJobs, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run("inspect-map", "M").code == 0
    assert jobs.job.asked == frozenset()
    assert run("inspect-map", "M", "--group-size", "auto").code == 0
    assert jobs.job.asked == {"group_size"}
    monkeypatch.setenv("GPTQ_BITS", "4")
    preset = tmp_path / "p.toml"
    preset.write_text("group_size = 64\nsamples = 9\n")
    assert run("inspect-map", "M", "--config", str(preset)).code == 0
    assert jobs.job.asked == {"bits", "group_size"}


def test_exit_0_or_3(jobs: FakeJobs, run: Run) -> None:
    outcome = run("inspect-map", "M")
    assert outcome.out.endswith(" verdict: fits with warnings\n")
    jobs.results["inspect_map"] = refused()
    outcome = run("inspect-map", "M")
    assert outcome.code == 3
    assert outcome.out.endswith(" verdict: refused\n")
    assert outcome.err.startswith("error [disk-offload] ")
    assert run("inspect-map", "M", "--quiet").err == outcome.err


def test_json_has_the_sums_and_the_verdict(jobs: FakeJobs, run: Run) -> None:
    body = json.loads(run("inspect-map", "M", "--json").out)
    device = body["devices"][0]
    assert device["needed_bytes"] == sum(
        value for name, value in device.items() if name.endswith("_bytes") and name in PARTS
    )
    assert (device["fits"], body["ok"], body["verdict"]) == (True, True, "fits with warnings")
    assert body["budgets"][0]["device"] == "cuda:0"


PARTS = {
    "weights_bytes",
    "working_bytes",
    "hessian_bytes",
    "activation_bytes",
    "packing_bytes",
    "baseline_bytes",
}


def test_findings_are_part_of_the_result_and_warnings_reach_stderr_too(jobs: FakeJobs, run: Run) -> None:
    def announce(observer: Observer) -> None:
        observer(PhaseStarted("open"))
        observer(FindingRaised(DENSE))
        observer(FindingRaised(OFFLOAD))

    jobs.action = announce
    outcome = run("inspect-map", "M")
    assert outcome.out.count("cpu-offload") == 1
    started, warning, _ = outcome.err.splitlines()
    assert started == "[0:00:00] open: started"
    assert warning.startswith("[0:00:00] warning [cpu-offload] model.layers.28-29: CPU offload is not")
    quiet = run("inspect-map", "M", "--quiet")
    assert (quiet.out, quiet.err) == (outcome.out, "")


def test_explain_needs_no_model(run: Run) -> None:
    for rule, word in (("disk-offload", "disk"), ("four-bits-only", "4-bit"), ("scales-finite", "NaN")):
        outcome = run("inspect-map", "--explain", rule)
        assert outcome.code == 0
        assert word in outcome.out
    outcome = run("inspect-map", "--explain", "disk-offlaod")
    assert outcome.code == 2
    assert "did you mean disk-offload" in outcome.err


@pytest.mark.parametrize("words", ["inspect-map M", "quantize M --out D --dry-run"])
def test_why_it_is_refused_is_an_event_among_json_lines(words: str, jobs: FakeJobs, run: Run) -> None:
    jobs.results["inspect_map"] = jobs.results["dry_run"] = refused()
    outcome = run(*words.split(), "--progress", "jsonl")
    assert outcome.code == 3
    events = [json.loads(line) for line in outcome.err.splitlines()]
    errors = [finding.rule for finding in refused().findings if finding.level == "error"]
    assert [event["finding"]["rule"] for event in events if event["event"] == "FindingRaised"] == errors != []
