"""`gptq load`: the job that the words make, and what is shown for it."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from gptq_cli.errors import OutOfDeviceMemory
from gptq_cli.events import Observer, PhaseFinished, PhaseStarted, TextGenerated
from gptq_cli.load_job import LoadJob, Sampling, TaskConfig
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.results.load import Gate, LoadReport
from tests.cli.conftest import FakeJobs, Run
from tests.display.events import load_report, verify_report


def test_defaults_are_those_of_the_configuration(jobs: FakeJobs, run: Run) -> None:
    assert run("load", "DIR").code == 0
    assert (jobs.called, jobs.job) == ("load", LoadJob(path="DIR"))


def test_every_option_reaches_the_job(jobs: FakeJobs, run: Run) -> None:
    words = """
        load DIR --prompt Hello --raw --max-new-tokens 8 --temperature 0.7 --top-p 0.9 --top-k 40 --seed 3
        --eval pydoc --seq-len 128 --windows 4 --against DENSE --max-kl 0.1 --max-perplexity 20 --bench
        --verify --target vllm --target sglang --target vllm --tp 4 --device-map cpu --kernel dequantize
        --compile --dtype bfloat16 --trust-remote-code
        --tasks arc_easy,mine --task-dir T --task-limit 9 --shots 2 --min-score mine=0.4
    """
    outcome = run(*words.split())
    assert outcome.code == 0, outcome.err
    assert jobs.job == LoadJob(
        path="DIR",
        device_map=DeviceMap.parse("cpu"),
        dtype="bfloat16",
        trust_remote_code=True,
        kernel="dequantize",
        compile=True,
        prompt="Hello",
        raw=True,
        max_new_tokens=8,
        sampling=Sampling(temperature=0.7, top_p=0.9, top_k=40, seed=3),
        evaluate="pydoc",
        seq_len=128,
        windows=4,
        against="DENSE",
        max_kl=0.1,
        max_perplexity=20.0,
        tasks=TaskConfig(
            names=("arc_easy", "mine"), directory="T", limit=9, shots=2, min_scores=(("mine", 0.4),)
        ),
        bench=True,
        verify=True,
        targets=("vllm", "sglang"),
        tp=4,
    )
    default = LoadJob(path="DIR")
    untouched = [f.name for f in fields(LoadJob) if getattr(jobs.job, f.name) == getattr(default, f.name)]
    assert untouched == ["path"], "a field without an option, or without a word above"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("--max-kl 0.1", "max_kl is 0.1, but nothing is measured for it", "add --against DENSE"),
        ("--max-perplexity 9", "max_perplexity is 9.0, but nothing", "add --eval SOURCE"),
        ("--prompt x --top-p 0.5", "top_p is 0.5, but temperature is 0", "add --temperature 0.7"),
        ("--shots 1", "shots is given, but no task is measured", "add --tasks NAME"),
        ("--tasks a,,b", "tasks holds an empty name", "--tasks arc_easy,hellaswag"),
        ("--tasks a --min-score b=1", "min_score is about 'b', which is not measured", "--tasks a,b"),
        ("--tasks a --min-score a", "min_score is 'a'; allowed: TASK=NUMBER", "--min-score arc_easy=0.4"),
        ("--tasks a --min-score a=nan", "min_score of a is nan", ""),
        ("--tasks a --task-limit 0", "task_limit is 0; allowed", ""),
        ("--target vlm", "target is 'vlm'; allowed: vllm, sglang, transformers", ""),
    ],
)
def test_what_cannot_be_asked_starts_nothing(
    jobs: FakeJobs, run: Run, words: str, message: str, hint: str
) -> None:
    outcome = run("load", "DIR", *words.split())
    assert (outcome.code, outcome.out, jobs.called) == (2, "", "")
    assert message in outcome.err
    assert hint in outcome.err


PIECES = ("Paris,", " a city of [bold]two[/bold]", " million people.")


def speaking(observer: Observer) -> None:
    """What a job tells while it generates."""
    observer(PhaseStarted("generate", 9))
    for number, piece in enumerate(PIECES):
        observer(TextGenerated(piece, 3 * number + 3))
    observer(PhaseFinished("generate", 0.5))


@pytest.mark.parametrize("words", ["load DIR", "quantize M --out O"])
def test_two_texts_to_measure_on_are_refused(
    jobs: FakeJobs, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    preset = tmp_path / "p.toml"
    preset.write_text('eval = ["a b.txt", "pydoc"]')
    given = [("--eval", "a b.txt", "--eval=pydoc"), ("--config", str(preset)), ()]
    for more in given:
        if not more:
            monkeypatch.setenv("GPTQ_EVAL", "a b.txt\npydoc\n")
        outcome = run(*words.split(), *more)
        assert (outcome.code, jobs.called) == (2, "")
        assert "--eval is given 2 times: 'a b.txt', 'pydoc'; allowed: one text" in outcome.err
        assert "hint: measure each by itself: gptq load DIR --eval SOURCE" in outcome.err
    monkeypatch.setenv("GPTQ_EVAL", "a b.txt")
    assert run("load", "DIR").code == 0
    assert jobs.job.evaluate == "a b.txt"


def test_the_text_comes_first_as_it_is_and_apart_from_the_table(jobs: FakeJobs, run: Run) -> None:
    jobs.action = speaking
    outcome = run("load", "DIR", "--prompt", "The capital of France is")
    assert outcome.out.startswith("".join(PIECES) + "\n\n smol-w4g64 is loaded")
    assert outcome.out.count("Paris") == 1
    assert "no accelerator is present" in outcome.out


def test_the_text_is_on_stdout_as_soon_as_it_is_there(
    jobs: FakeJobs, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def act(observer: Observer) -> None:
        for number, piece in enumerate(PIECES):
            observer(TextGenerated(piece, number + 1))
            seen.append(capsys.readouterr().out)

    jobs.action = act
    run("load", "DIR", "--prompt", "x", "--quiet")
    assert seen == list(PIECES)


def test_a_text_that_ends_its_line_is_followed_by_one_empty_line(jobs: FakeJobs, run: Run) -> None:
    jobs.action = lambda observer: observer(TextGenerated("done\n", 1))
    assert run("load", "DIR", "--prompt", "x").out.startswith("done\n\n smol-w4g64")


def test_an_error_within_the_text_stands_on_a_line_of_its_own(jobs: FakeJobs, run: Run) -> None:
    def act(observer: Observer) -> None:
        observer(TextGenerated("half a", 1))
        raise OutOfDeviceMemory("m")

    jobs.action = act
    outcome = run("load", "DIR", "--prompt", "x")
    assert (outcome.code, outcome.out) == (4, "half a\n\n")


def test_in_a_json_run_the_text_is_in_the_document_alone(jobs: FakeJobs, run: Run) -> None:
    jobs.action = speaking
    assert json.loads(run("load", "DIR", "--prompt", "x", "--json").out)["text"] == "".join(PIECES)


def failing() -> LoadReport:
    return replace(load_report(), gates=(Gate("max_kl", 0.05, 0.0813), Gate("max_perplexity", 30.0, 23.456)))


def test_a_closed_gate_is_exit_5_after_the_table(jobs: FakeJobs, run: Run) -> None:
    jobs.results["load"] = failing()
    outcome = run("load", "DIR")
    assert outcome.code == 5
    assert "FAILED  max_kl 0.05, found 0.0813" in outcome.out
    assert "passed  max_perplexity 30, found 23.46" in outcome.out
    assert outcome.err.startswith("error: kl is 0.0813, above --max-kl 0.05\n")


def test_a_closed_gate_is_one_document(jobs: FakeJobs, run: Run) -> None:
    jobs.results["load"] = failing()
    outcome = run("load", "DIR", "--json")
    assert outcome.code == 5
    body = json.loads(outcome.out)
    assert (body["ok"], body["perplexity"]) == (False, 23.456)
    expected = {"name": "max_kl", "limit": 0.05, "found": 0.0813, "subject": "", "passed": False}
    assert body["gates"][0] == expected


@pytest.mark.parametrize(("sound", "code"), [(True, 0), (False, 5)])
def test_a_verification_alone(jobs: FakeJobs, run: Run, sound: bool, code: int) -> None:
    jobs.results["load"] = verify_report(sound=sound)
    outcome = run("load", "DIR", "--verify", "--target", "vllm")
    assert outcome.code == code
    assert ("zeros-convention" in outcome.out) is False
    assert ("WILL NOT take it" in outcome.out) is not sound
    body = json.loads(run("load", "DIR", "--verify", "--json").out)
    assert body["ok"] is sound
    assert [target["ok"] for target in body["targets"]] == [True, sound]


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


def piped(data: bytes) -> io.TextIOWrapper:
    """Standard input as a pipe gives it: universal newlines, bytes that are no text kept as surrogates."""
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="surrogateescape")


@pytest.mark.parametrize(
    ("data", "plain"),
    [
        (b"def f():\n\n", "def f():\n"),
        (b"one\r\ntwo\r\n", "one\r\ntwo"),
        (b"\r\n\r\n x \r", "\r\n\r\n x \r"),
        (b"  a\tb  ", "  a\tb  "),
        (b"a\x00b\x1a\n", "a\x00b\x1a"),
        ("\ufeffna\u00efve 漢\u2028\n".encode(), "\ufeffna\u00efve 漢\u2028"),
        (b"\n\n", "\n"),
    ],
)
def test_standard_input_is_kept(
    jobs: FakeJobs, run: Run, monkeypatch: pytest.MonkeyPatch, data: bytes, plain: str
) -> None:
    monkeypatch.setattr(sys, "stdin", piped(data))
    assert run("load", "DIR", "--prompt", "-").code == 0
    assert jobs.job.prompt == plain
    monkeypatch.setattr(sys, "stdin", piped(data))
    assert run("load", "DIR", "--prompt", "-", "--raw").code == 0
    assert jobs.job.prompt.encode() == data


def test_a_line_end_alone_is_a_prompt_when_raw(
    jobs: FakeJobs, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", piped(b"\n"))
    assert run("load", "DIR", "--prompt", "-", "--raw").code == 0
    assert jobs.job.prompt == "\n"


@pytest.mark.parametrize("words", [(), ("--raw",)])
def test_a_prompt_that_is_not_utf8(
    jobs: FakeJobs, run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "stdin", piped(b"caf\xe9\n"))
    outcome = run("load", "DIR", "--prompt", "-", *words)
    assert (outcome.code, jobs.called) == (2, "")
    assert "standard input is not UTF-8: byte 0xe9 at byte 4" in outcome.err
    assert "iconv" in outcome.err
    outcome = run("load", "DIR", "--prompt", os.fsdecode(b"caf\xe9"), *words)
    assert (outcome.code, jobs.called) == (2, "")
    assert "prompt is not UTF-8: byte 0xe9 at character 4" in outcome.err


def test_a_standard_input_that_cannot_be_read(
    jobs: FakeJobs, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Directory(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise IsADirectoryError(21, "Is a directory")

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Directory()))
    outcome = run("load", "DIR", "--prompt", "-")
    assert (outcome.code, jobs.called) == (2, "")
    assert "standard input cannot be read: Is a directory" in outcome.err


def test_standard_input_is_one_text(jobs: FakeJobs, run: Run) -> None:
    outcome = run("load", "DIR", "--prompt", "-", "--eval", "-")
    assert (outcome.code, jobs.called) == (2, "")
    assert "can be read once" in outcome.err


@pytest.mark.parametrize("stdin", [None, io.StringIO("")], ids=["closed", "empty"])
def test_standard_input_that_gives_nothing_is_an_error(
    jobs: FakeJobs, run: Run, monkeypatch: pytest.MonkeyPatch, stdin: io.StringIO | None
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    outcome = run("load", "DIR", "--prompt", "-")
    assert (outcome.code, jobs.called) == (2, "")
    assert outcome.err.startswith("error: prompt is '-', but standard input is")


def test_a_page_is_written_beside_the_result(jobs: FakeJobs, run: Run, tmp_path: Path) -> None:
    page = tmp_path / "load.html"
    assert run("load", "DIR", "--report", str(page)).code == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    jobs.called = ""
    refused = run("load", "DIR", "--report", str(tmp_path))
    assert (refused.code, jobs.called) == (2, "")
    assert "which is a directory" in refused.err


def test_a_page_that_cannot_be_written_any_more_is_a_warning(
    jobs: FakeJobs, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    jobs.action = lambda observer: folder.rmdir()
    outcome = run("load", "DIR", "--report", str(folder / "x.html"), "--json")
    assert outcome.code == 0
    assert "was not written: no such file" in outcome.err
    assert "was not written" in json.loads(outcome.out)["warnings"][-1]


@pytest.mark.parametrize("words", [(), ("--verify",), ("--target", "vllm")], ids=str)
def test_a_path_to_nothing_is_a_wrong_argument_whatever_is_asked(
    run: Run, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """With 5 a pipeline would take a wrong path for bad files."""
    failed = run("load", str(tmp_path / "none"), *words)
    assert failed.code == 2
    assert "no such directory" in failed.err
