"""Every command's document and every line of its event streams, as their schemas say: of real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documents import checked_document, checked_events, validator
from tests.e2e.commands import FAST, gptq


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, made and measured; its run's document and events are checked on the way."""
    folder = tmp_path_factory.mktemp("made")
    out, events = folder / "q", folder / "events.jsonl"
    words = ("--calibration", text, *FAST[:-1], "jsonl", "--eval", text, "--bench", "--device-map", "cpu")
    done = gptq("quantize", tiny_llama, "--out", out, *words, "--json", "--events", events)
    assert done.code == 0, done.stderr
    validator("run_report").validate(done.document)
    checked_document((out / "report.json").read_text(encoding="utf-8"), "run_report")
    shown, kept = checked_events(done.stderr), checked_events(events.read_text(encoding="utf-8"))
    assert [event["event"] for event in shown] == [event["event"] for event in kept]
    assert {"RunStarted", "BlockFinished", "LinearQuantized", "RunFinished"} <= {e["event"] for e in shown}
    return out


def test_a_loaded_checkpoint(quantized: Path, text: Path, tiny_llama: Path) -> None:
    cpu = ("--device-map", "cpu", "--json", "--progress", "jsonl")
    opened = gptq("load", quantized, *cpu)
    checked_events(opened.stderr)
    unmeasured = (
        "prompt_tokens",
        "new_tokens",
        "tokens_per_second",
        "windows",
        "seq_len",
        "perplexity",
        "bench",
    )
    assert {opened.document[name] for name in unmeasured} == {None}
    measured = gptq("load", quantized, "--prompt", "a", "--max-new-tokens", "2", "--against", tiny_llama,
                    "--eval", text, "--windows", "2", "--verify", *cpu)  # fmt: skip
    checked_events(measured.stderr)
    validator("load_report").validate(measured.document)
    assert measured.document["new_tokens"] == 2


@pytest.mark.parametrize(
    ("words", "schema"),
    [
        (("rules",), "rules"),
        (("targets",), "targets"),
        (("recipes",), "recipes"),
        (("doctor",), "doctor"),
        (("quantize", "--explain", "memory-budget"), "failure"),
        (("inspect-map", "--explain", "memory-budget"), "rule"),
        (("load", "no-such-directory"), "failure"),
        (("quantize", "m", "--out", "o", "--bits", "5"), "failure"),
        (("load", "d", "--nope"), "failure"),
    ],
)
def test_what_needs_no_model(words: tuple[str, ...], schema: str) -> None:
    done = gptq(*words, "--json")
    validator(schema).validate(done.document)


def test_a_plan_a_map_and_a_trial(tiny_llama: Path, text: Path) -> None:
    words = ("--calibration", text, *FAST)
    for more, schema in ((("--dry-run",), "map_report"), (("--blocks", "1"), "trial_report")):
        done = gptq("quantize", tiny_llama, *words, *more, "--json")
        validator(schema).validate(done.document)
    validator("map_report").validate(gptq("inspect-map", tiny_llama, "--json").document)


def test_unsound_files_have_no_figures(tiny_llama: Path, quantized: Path) -> None:
    sound = gptq("load", quantized, "--verify", "--json", "--progress", "none").document
    validator("verify_report").validate(sound)
    assert sound["tensors"] > 0
    unsound = gptq("load", tiny_llama, "--verify", "--json", "--progress", "none").document
    assert (unsound["ok"], unsound["tensors"], unsound["coverage"]) == (False, None, None)


def test_an_error_is_an_event_too(tiny_llama: Path, quantized: Path) -> None:
    done = gptq("quantize", tiny_llama, "--out", quantized, "--progress", "jsonl")
    *before, said, last = checked_events(done.stderr)
    found = [event["finding"]["rule"] for event in before if event["event"] == "FindingRaised"]
    assert found == ["output-exists", "seq-len-positions"]
    assert said == said | {"event": "Log", "text": "error: refused by preflight: 2 errors"}
    assert (last["event"], last["type"]) == ("Failed", "PreflightRefused")
