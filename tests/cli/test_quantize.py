"""`gptq quantize`: the job that the words make, and what is shown for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.load_job import LoadJob
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.placement.placement import parse_inventory
from gptq_cli.results.load import Gate
from tests.cli.conftest import FakeJobs, Run
from tests.display.events import load_report, report
from tests.display.map_reports import refused

EVERY_OPTION = """
    quantize M --out O --overwrite --max-shard-size 2GiB --bits 3 --group-size -1 --asym --desc-act
    --calibration - --samples 7 --seq-len 99 --seed 5 --batch-size 2 --device-map model=0,rest=cpu
    --max-memory 0=20GiB --dtype float16 --revision main --trust-remote-code --act-order none
    --damp-percent 0.01 --no-true-sequential --scale-search mse --positive-scales --sweeps 3 --no-refit
    --solve-for dense --column-batch 64 --strict --target vllm --target sglang --tp 4
"""


def test_defaults_are_those_of_the_configuration(jobs: FakeJobs, run: Run) -> None:
    assert run("quantize", "M", "--out", "O").code == 0
    expected = QuantizeJob(
        model=ModelRef(model="M"), out="O", command_line=("gptq", "quantize", "M", "--out", "O")
    )
    assert jobs.called == "quantize"
    assert jobs.job == expected


def test_every_option_reaches_the_job(jobs: FakeJobs, run: Run) -> None:
    words = EVERY_OPTION.split()
    outcome = run(*words)
    assert outcome.code == 0, outcome.err
    assert jobs.job == QuantizeJob(
        model=ModelRef(model="M", revision="main", trust_remote_code=True, dtype="float16"),
        out="O",
        quantize=QuantizeConfig(
            bits=3,
            group_size=-1,
            sym=False,
            desc_act=True,
            act_order="none",
            damp_percent=0.01,
            true_sequential=False,
            scale_search="mse",
            positive_scales=True,
            sweeps=3,
            refit=False,
            solve_for="dense",
            column_batch=64,
        ),
        calibration=CalibrationConfig.of("-", samples=7, seq_len=99, seed=5, batch_size=2),
        device_map=DeviceMap.parse("model=0,rest=cpu"),
        max_memory=MaxMemory.parse("0=20GiB"),
        max_shard_bytes=2 * 2**30,
        overwrite=True,
        strict=True,
        targets=("vllm", "sglang"),
        tp=4,
        command_line=("gptq", *words),
    )


def test_every_field_of_the_configuration_is_an_option(jobs: FakeJobs, run: Run) -> None:
    from dataclasses import fields
    from inspect import signature

    from gptq_cli.cli.quantize import quantize

    names = set(signature(quantize).parameters)
    assert {field.metadata.get("name", field.name) for field in fields(QuantizeConfig)} <= names
    assert {field.name for field in fields(CalibrationConfig)} - {"sources"} <= names
    assert {field.name for field in fields(ModelRef)} <= names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bits 5", "bits is 5; allowed: 2, 3, 4, 8"),
        ("--target vlm", "target is 'vlm'; allowed: vllm, sglang"),
        ("--group-size 0", "group_size is 0; allowed: -1"),
        ("--damp-percent nan", "damp_percent is nan"),
        ("--samples 0", "samples is 0"),
        ("--device-map layers=", "value missing"),
        ("--device-map cuda:-1", "device map"),
        ("--device-map [1]", "JSON that is not an object"),
        ("--max-memory lots", "max memory"),
        ("--max-shard-size huge", "max_shard_size: 'huge' is not a size"),
        ("--max-shard-size 5Gb", "max_shard_size: '5Gb' reads as bits"),
        ("--devices cuda:0=24GiB", "devices is given, but this is not a dry run"),
        ("--report nowhere/at/all/r.html", "which cannot be written: no such file or directory"),
        ("--report O/report.json", "report is 'O/report.json', a page in out, where other files"),
        ("--report O/pages/r.html", "which cannot be written: no such file or directory"),
        ("--report O", "report and out are both 'O'"),
        ("--report ./O", "report and out are both 'O'"),
        ("--report new/", "report is 'new/', which is a directory"),
        ("--report r.html --log-file r.html", "report and log_file are both 'r.html'"),
        ("--report r.html --events ./r.html", "report and events are both './r.html'"),
    ],
)
def test_bad_values_start_nothing(jobs: FakeJobs, run: Run, words: str, message: str) -> None:
    outcome = run("quantize", "M", "--out", "O", *words.split())
    assert (outcome.code, outcome.out, jobs.called) == (2, "", "")
    assert outcome.err.startswith("error: ")
    assert message in outcome.err


def test_the_caret_of_a_grammar_error_stands_under_the_character(jobs: FakeJobs, run: Run) -> None:
    lines = run("quantize", "M", "--out", "O", "--device-map", "model=0,,lm_head=cpu").err.splitlines()
    assert lines[2].index("^") == lines[1].index(",,") + 1


def test_a_job_without_destination_is_refused(jobs: FakeJobs, run: Run) -> None:
    outcome = run("quantize", "M")
    assert (outcome.code, jobs.called) == (2, "")
    assert outcome.err == "error: out is empty; allowed: a directory to create\n  hint: add --out DIR\n"


def test_the_result_as_json_is_the_report(jobs: FakeJobs, run: Run) -> None:
    outcome = run("quantize", "M", "--out", "O", "--json")
    body = json.loads(outcome.out)
    assert outcome.out.count("\n") == 1
    assert (body["schema_version"], body["bits"], len(body["blocks"])) == (1, 4, 3)
    assert body["measured_peak_bytes"]["cuda:0"] == body["blocks"][0]["peak_bytes"]["cuda:0"]
    assert outcome.out.isascii()


def test_the_result_as_a_table_ends_with_the_next_command(jobs: FakeJobs, run: Run) -> None:
    outcome = run("quantize", "M", "--out", "O")
    assert outcome.out.endswith("next: gptq load smol-w4g64\n")
    assert "\x1b" not in outcome.out
    assert all(line == line.rstrip() for line in outcome.out.splitlines())


def test_a_report_page_is_written(jobs: FakeJobs, run: Run, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    assert run("quantize", "M", "--out", "O", "--report", str(page)).code == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_page_in_the_destination_needs_a_name_of_its_own(jobs: FakeJobs, run: Run, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()  # empty, as a volume is
    outcome = run("quantize", "M", "--out", str(tmp_path / "o"), "--report", f"{tmp_path}/o/README.md")
    assert (outcome.code, jobs.called) == (2, "")
    assert f"hint: --report {tmp_path}/o/README.html\n" in outcome.err


def test_a_directory_is_no_page(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run("quantize", "M", "--out", ".", "--report", ".")
    assert outcome.code == 2
    assert "report is '.', which is a directory" in outcome.err


def test_a_page_is_not_where_the_destination_needs_a_directory(
    jobs: FakeJobs, run: Run, tmp_path: Path
) -> None:
    outcome = run("quantize", "M", "--out", str(tmp_path / "a" / "b"), "--report", str(tmp_path / "a"))
    assert (outcome.code, jobs.called) == (2, "")
    assert f"where out ({tmp_path / 'a' / 'b'}) needs a directory" in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_plans_and_needs_no_destination(jobs: FakeJobs, run: Run) -> None:
    outcome = run(
        "quantize", "org/My-Model", "--dry-run", "--devices", "cuda:0=24GiB,cpu=64GiB", "--bits", "8"
    )
    assert (outcome.code, jobs.called) == (0, "dry_run")
    assert jobs.job.out == "My-Model-w8"
    assert jobs.job.devices == parse_inventory("cuda:0=24GiB,cpu=64GiB")
    assert "about 15 min 05 s (an estimate from a short probe)" in outcome.out


@pytest.mark.parametrize(("words", "processes"), [((), 4), (("--processes", "8"), 8)])
def test_a_dry_run_under_a_launcher_plans_for_its_processes(
    words: tuple[str, ...], processes: int, jobs: FakeJobs, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run("quantize", "M", "--out", "O", "--dry-run", *words).code == 0
    assert (jobs.called, jobs.more["processes"]) == ("dry_run", processes)


def test_a_dry_run_that_would_be_refused_exits_3(jobs: FakeJobs, run: Run) -> None:
    jobs.results["dry_run"] = refused()
    outcome = run("quantize", "M", "--out", "O", "--dry-run", "--json")
    assert outcome.code == 3
    assert json.loads(outcome.out)["verdict"] == "refused"
    assert outcome.err.startswith("error [disk-offload] ")  # stdout may be a file that nobody looks into


def test_a_fallback_is_said_on_stdout_too(jobs: FakeJobs, run: Run) -> None:
    assert "fell back to round-to-nearest" in run("quantize", "M", "--out", "O").out
    jobs.results["quantize"] = replace(jobs.results["quantize"], fallbacks=0, blocks=())
    assert " fallbacks    none" in run("quantize", "M", "--out", "O").out


def test_what_to_measure_reaches_the_job(jobs: FakeJobs, run: Run) -> None:
    words = [
        "quantize",
        "M",
        "--out",
        "O",
        "--eval",
        "T",
        "--against-source",
        "--max-kl",
        "0.1",
        "--max-perplexity",
        "9",
        "--bench",
    ]
    assert run(*words, "--device-map", "cpu").code == 0
    assert jobs.more["proof"] == LoadJob(
        path="O",
        device_map=DeviceMap.parse("cpu"),
        evaluate="T",
        against="M",
        max_kl=0.1,
        max_perplexity=9.0,
        bench=True,
    )
    assert run("quantize", "M", "--out", "O").code == 0
    assert jobs.more["proof"] is None


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--max-kl", "1"], "add --against-source"),
        (["--max-perplexity", "1"], "add --eval SOURCE"),
        (["--eval", "-"], "give --eval a file"),
        (["--bench", "--blocks", "1"], "leave out --blocks"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(
    words: list[str], hint: str, jobs: FakeJobs, run: Run
) -> None:
    outcome = run("quantize", "M", "--out", "O", *words)
    assert (outcome.code, jobs.called) == (2, "")
    assert hint in " ".join(outcome.err.split())


def test_a_limit_that_is_exceeded_is_exit_5_after_the_result(jobs: FakeJobs, run: Run) -> None:
    failed = replace(load_report(), gates=(Gate("max_kl", 0.1, 0.2),))
    jobs.results["quantize"] = replace(report(), proof=failed)
    outcome = run("quantize", "M", "--out", "O", "--against-source", "--max-kl", "0.1")
    assert outcome.code == 5
    assert "FAILED  max_kl 0.1, found 0.2" in outcome.out
    assert "the checkpoint is complete and stays" in " ".join(outcome.err.split())
