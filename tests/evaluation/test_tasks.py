"""Tasks of lm-evaluation-harness: a real local task where it is installed; else an error that names it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.e2e.commands import FAST, gptq

HARNESS = importlib.util.find_spec("lm_eval") is not None
TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one task of twelve questions."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {
            "question": f"block {number} and",
            "choices": ["writes codes", "reads", "one"],
            "answer": number % 3,
        }
        for number in range(12)
    ]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in questions), encoding="utf-8")
    (folder / "tiny_choice.yaml").write_text(TASK.format(file=file), encoding="utf-8")
    return folder


@pytest.mark.skipif(HARNESS, reason="lm-evaluation-harness is installed")
def test_without_the_harness_the_error_names_what_to_install(
    tiny_llama: Path, text: Path, tasks: Path, tmp_path: Path
) -> None:
    words = ("--tasks", "tiny_choice", "--task-dir", tasks)
    for command in (
        ("load", tiny_llama),
        ("quantize", tiny_llama, "--out", tmp_path / "q", "--calibration", text, *FAST),
    ):
        refused = gptq(*command, *words)
        assert refused.code == 2
        assert "tasks is 'tiny_choice', but lm-evaluation-harness is not installed" in refused.stderr
        assert "pip install 'gptq-cli[eval]'" in refused.stderr
    assert not (tmp_path / "q").exists()


@pytest.mark.skipif(not HARNESS, reason="needs lm-evaluation-harness: pip install 'gptq-cli[eval]'")
@pytest.mark.filterwarnings("default")  # those of the harness are its own
def test_a_local_task_is_scored_of_both_models_and_gated(
    tiny_llama: Path, text: Path, tasks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q"
    words = (
        "--tasks",
        "tiny_choice",
        "--task-dir",
        tasks,
        "--task-limit",
        "6",
        "--device-map",
        "cpu",
        "--json",
    )
    made = gptq(
        *("quantize", tiny_llama, "--out", out, "--calibration", text, *FAST, *words),
        *("--eval", text, "--against-source", "--min-score", "tiny_choice=2"),
    )
    assert made.code == 5, made.stderr
    assert "below --min-score tiny_choice=2" in made.stderr
    scores = made.document["proof"]["tasks"]
    assert [(one["metric"], one["samples"], one["shots"]) for one in scores] == [
        ("acc_norm", 6, 0),
        ("acc", 6, 0),
    ]
    assert all(one["dense"] is not None for one in scores)
    assert json.loads((out / "report.json").read_text())["proof"]["tasks"] == scores
    assert "| `tiny_choice` | `acc_norm` |" in (out / "README.md").read_text(encoding="utf-8")
    loaded = gptq("load", out, *words, "--min-score", "tiny_choice=0")
    assert loaded.code == 0, loaded.stderr
    assert [one["value"] for one in loaded.document["tasks"]] == [one["value"] for one in scores]


@pytest.mark.skipif(not HARNESS, reason="needs lm-evaluation-harness: pip install 'gptq-cli[eval]'")
@pytest.mark.filterwarnings("default")
def test_a_text_that_cannot_be_had_is_found_before_a_weight_is_read(
    tiny_llama: Path, text: Path, tasks: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    broken = (tasks / "tiny_choice.yaml").read_text().replace("questions.jsonl", "nosuch.jsonl")
    (folder / "tiny_choice.yaml").write_text(broken)
    words = ("--calibration", text, *FAST, "--tasks", "tiny_choice", "--task-dir", folder)
    refused = gptq("quantize", tiny_llama, "--out", tmp_path / "q", *words)
    assert refused.code == 2
    assert "tiny_choice cannot be opened" in refused.stderr
    assert not (tmp_path / "q").exists()
