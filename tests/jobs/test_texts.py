"""What a text of `gptq load` needs of the model is known before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptq_cli import jobs
from gptq_cli.errors import CheckpointError, ConfigError, ModelError, UsageError
from gptq_cli.events import Event, Warned
from gptq_cli.jobs import loading
from gptq_cli.load_job import LoadJob
from gptq_cli.results.load import LoadReport
from tests.checkpoint.checkpoints import Recipe, quantize_directory
from tests.conftest import TinyFactory
from tests.e2e.commands import write_text


@pytest.fixture(scope="module")
def checkpoints(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> a checkpoint of the tiny model; 512 positions, learned or rotary."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("texts") / name
            quantize_directory(tiny(name), made[name], Recipe(group_size=32), transposed=name == "gpt2")
        return made[name]

    return of


@pytest.fixture
def llama(checkpoints: Any, tmp_path: Path) -> Path:
    """A copy to edit, its weights linked."""
    for path in checkpoints("llama").iterdir():
        if path.suffix == ".safetensors":
            (tmp_path / path.name).symlink_to(path)
        else:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def warnings_of(job: LoadJob) -> tuple[LoadReport, list[str]]:
    events: list[Event] = []
    report = jobs.load(job, events.append)
    assert isinstance(report, LoadReport)
    return report, [event.message for event in events if isinstance(event, Warned)]


def refused(job: LoadJob, monkeypatch: pytest.MonkeyPatch, kind: type[UsageError], message: str) -> str:
    """`job` must end with `message` before a weight is read; returns the hint."""

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "load_quantized", never)
    with pytest.raises(kind, match=message) as caught:
        jobs.load(job)
    assert caught.value.exit_code == 2
    return caught.value.hint or ""


WORD = "import "  # two tokens or fewer


def test_learned_positions_end(checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpt2", "opt"):
        path = str(checkpoints(name))
        long = LoadJob(path=path, prompt=WORD * 600, max_new_tokens=1)
        hint = refused(
            long, monkeypatch, ConfigError, r"the prompt has [\d,]+ tokens, but the model has 512 pos"
        )
        assert "shorten" in hint
        much = LoadJob(path=path, prompt="a", max_new_tokens=600)
        message = r"prompt of 1 token and max_new_tokens 600 need 600 positions, but the model has 512"
        assert "--max-new-tokens 512" in refused(much, monkeypatch, ConfigError, message)
        wide = LoadJob(path=path, evaluate="pydoc-heldout", seq_len=513)
        message = "seq_len is 513; allowed: at most the 512 positions"
        assert "--seq-len 512" in refused(wide, monkeypatch, ConfigError, message)


def test_the_hint_works(checkpoints: Any) -> None:
    job = LoadJob(path=str(checkpoints("gpt2")), prompt="a", max_new_tokens=512)
    report, warned = warnings_of(job)
    assert report.prompt_tokens == 1
    assert not [text for text in warned if "positions" in text]


def test_rotary_positions_go_on_with_a_warning(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    text = write_text(tmp_path / "text.txt")
    fits, warned = warnings_of(LoadJob(path=str(llama), prompt="a", max_new_tokens=8))
    assert not [message for message in warned if "positions" in message]
    job = LoadJob(
        path=str(llama), prompt="a", max_new_tokens=9, evaluate=str(text), seq_len=32, windows=2, bench=True
    )
    report, warned = warnings_of(job)
    assert report.new_tokens >= fits.new_tokens
    assert "windows of 32 tokens go past the 8 positions that the model was made for" in warned
    prompt = "the prompt of 1 token and up to 9 new ones go past the 8 positions that the model was made for"
    assert prompt in warned
    assert report.bench is not None
    assert report.bench.speed.prompt_tokens + report.bench.speed.new_tokens <= 8


def test_settings_that_are_not_followed_are_a_warning(llama: Path) -> None:
    settings = {"num_beams": 2, "cache_implementation": "quantized", "eos_token_id": 1}
    (llama / "generation_config.json").write_text(json.dumps(settings))
    report, warned = warnings_of(LoadJob(path=str(llama), prompt="a", max_new_tokens=4))
    assert report.text
    assert "generation_config.json sets cache_implementation = 'quantized': not followed here" in warned
    assert "generation_config.json sets num_beams = 2: the text appears as one piece, at the end" in warned


def test_settings_that_cannot_be_followed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = LoadJob(path=str(llama), prompt="a")
    for settings, message in (
        ({"repetition_penalty": -1}, "repetition_penalty is -1; allowed: a number above 0"),
        ({"stop_strings": ["漢", 5]}, "stop_strings is"),
        ([1, 2], "holds a list"),
    ):
        (llama / "generation_config.json").write_text(json.dumps(settings))
        refused(job, monkeypatch, CheckpointError, message)


def test_a_template_that_fails(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = json.loads((llama / "tokenizer_config.json").read_text())
    template = "{{ raise_exception('no') }}"
    (llama / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": template}))
    job = LoadJob(path=str(llama), prompt="a")
    assert "--raw" in refused(job, monkeypatch, ConfigError, "the chat template refuses the prompt: no")


def test_a_prompt_of_no_tokens(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(LoadJob(path=str(llama), prompt=""), monkeypatch, ConfigError, "holds no tokens")


def test_a_tokenizer_of_another_model(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = llama / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 900, "content": "<|far|>"})
    path.write_text(json.dumps(content))
    job = LoadJob(path=str(llama), prompt="a <|far|>")
    refused(job, monkeypatch, ModelError, r"token \d+ of the prompt, but the model's embedding has 512 rows")
