"""What is taken from the README.md of a model, and what is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptq_cli.model.source_card import base_model_of, read_source_card
from gptq_cli.results.card import SourceCard

FULL = """---
license: other
license_name: llama3
license_link: LICENSE
language:
- en
tags:
- chat
- GGUF
- {evil: 1}
- "two\\nlines"
pipeline_tag: text-generation
widget: [[[]]]
---
# A model
"""


def test_licence_language_and_tags(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(FULL, encoding="utf-8")
    assert read_source_card(tmp_path) == SourceCard(
        license="other",
        license_name="llama3",
        license_link="LICENSE",
        pipeline_tag="text-generation",
        language=("en",),
        tags=("chat",),
    )


@pytest.mark.parametrize("content", ["", "# no front matter\n---\nlicense: mit\n---\n", "---\n- a\n---\n"])
def test_no_front_matter_is_an_empty_card(content: str, tmp_path: Path) -> None:
    assert read_source_card(tmp_path) == SourceCard()
    (tmp_path / "README.md").write_text(content, encoding="utf-8")
    assert read_source_card(tmp_path) == SourceCard()


@pytest.mark.parametrize("content", ["---\na: [\n---\n", "---\na: !!python/name:os.system\n---\n"])
def test_front_matter_that_is_not_yaml(content: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="front matter is not YAML"):
        read_source_card(tmp_path)


def test_a_pipe_and_a_link_out_are_not_opened(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "secret").write_text(FULL, encoding="utf-8")
    (model / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="leads out"):
        read_source_card(model)
    (model / "README.md").unlink()
    os.mkfifo(model / "README.md")
    with pytest.raises(ValueError, match="named pipe"):
        read_source_card(model)


def test_the_base_model_is_a_hub_id_or_a_name_never_a_path(tmp_path: Path) -> None:
    cached = tmp_path / "models--org--name" / "snapshots" / "c0ffee"
    local, odd = tmp_path / "my-model", tmp_path / "my model"
    for path in (cached, local, odd):
        path.mkdir(parents=True)
    assert base_model_of("org/name", cached) == "org/name"
    assert base_model_of(str(cached), cached) == "org/name"
    assert base_model_of(str(local), local) == "my-model"
    assert base_model_of(str(odd), odd) == ""
