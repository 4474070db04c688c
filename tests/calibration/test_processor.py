"""Where a processor keeps its chat template, in old and new files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.calibration import open_tokenizer
from gptq_cli.calibration.processor import processor_template
from gptq_cli.errors import ModelError
from tests.tiny import save_tokenizer


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("{{ messages }}", "{{ messages }}"),
        (
            [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}],
            {"default": "a", "rag": "b"},
        ),
        ("", None),
        (None, None),
        (5, None),
    ],
)
def test_it_is_found(name: str, value: Any, found: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"chat_template": value}))
    assert processor_template(tmp_path) == found


def test_no_processor(tmp_path: Path) -> None:
    assert processor_template(tmp_path) is None


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ModelError, match=r"chat_template\.json"):
        processor_template(tmp_path)


def test_the_tokenizers_own_template_comes_first(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert open_tokenizer(tmp_path).chat_template == "processor"
    (tmp_path / "chat_template.jinja").write_text("tokenizer")
    assert open_tokenizer(tmp_path).chat_template == "tokenizer"
