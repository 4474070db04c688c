"""`gptq load`: the job that the words make, and what is shown for it."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import pytest

from gptq_cli.config import LoadJob
from gptq_cli.device_map import DeviceMap
from tests.cli.conftest import FakeJobs, Run


def test_defaults_are_those_of_the_configuration(jobs: FakeJobs, run: Run) -> None:
    assert run("load", "DIR").code == 0
    assert (jobs.called, jobs.job) == ("load", LoadJob(path="DIR"))


def test_every_option_reaches_the_job(jobs: FakeJobs, run: Run) -> None:
    words = """
        load DIR --prompt Hello --max-new-tokens 8 --eval pydoc --seq-len 128 --windows 4 --device-map cpu
        --dtype bfloat16 --trust-remote-code
    """
    outcome = run(*words.split())
    assert outcome.code == 0, outcome.err
    assert jobs.job == LoadJob(
        path="DIR",
        device_map=DeviceMap.parse("cpu"),
        dtype="bfloat16",
        trust_remote_code=True,
        prompt="Hello",
        max_new_tokens=8,
        evaluate="pydoc",
        seq_len=128,
        windows=4,
    )


def test_the_text_comes_last_and_as_it_is(jobs: FakeJobs, run: Run) -> None:
    outcome = run("load", "DIR", "--prompt", "The capital of France is")
    assert outcome.out.endswith("\n\nParis, a city of [bold]two[/bold] million people.\n")
    assert "no accelerator is present" in outcome.out


def test_no_text_no_paragraph(jobs: FakeJobs, run: Run) -> None:
    jobs.results["load"] = replace(jobs.results["load"], text=None, new_tokens=0)
    assert not run("load", "DIR").out.endswith("\n\n")


def test_json_holds_the_text_and_the_reason(jobs: FakeJobs, run: Run) -> None:
    body = json.loads(run("load", "DIR", "--json").out)
    assert body["text"] == "Paris, a city of [bold]two[/bold] million people."
    assert body["device_reason"] == "no accelerator is present"
    assert body["kernels"][0]["linears"] == 180
    assert body["memory"] == {"cpu": 2**29}


def test_the_prompt_may_come_from_standard_input(
    jobs: FakeJobs, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon\na time\n"))
    assert run("load", "DIR", "--prompt", "-").code == 0
    assert jobs.job.prompt == "Once upon\na time"


@pytest.mark.parametrize("stdin", [None, io.StringIO("")], ids=["closed", "empty"])
def test_standard_input_that_gives_nothing_is_an_error(
    jobs: FakeJobs, run: Run, monkeypatch: pytest.MonkeyPatch, stdin: io.StringIO | None
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    outcome = run("load", "DIR", "--prompt", "-")
    assert (outcome.code, jobs.called) == (2, "")
    assert outcome.err.startswith("error: prompt is '-', but standard input is")
