"""How the texts of a model begin and end: through its template, or as documents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptq_cli.calibration import open_tokenizer
from gptq_cli.calibration.prompts import Prompts, read_prompts
from gptq_cli.calibration.text_form import text_form
from gptq_cli.errors import CalibrationError
from tests.tiny import tiny_model

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
PROMPTS = Prompts(("What is this?", "Explain that."), ("Once upon", "def f("))


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return open_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_requests_go_through_the_template(tokenizer: Any, model: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    form = text_form(tokenizer, model, PROMPTS, 0)
    expected = {ids(tokenizer, f"<s>user: {text}</s>\n<s>assistant: ") for text in PROMPTS.requests}
    assert set(form.beginnings) == expected
    assert form.closing == ids(tokenizer, "</s>\n")
    assert form.closing[0] == tokenizer.eos_token_id
    assert form.closing[0] in form.ends
    assert form.forbidden == (tokenizer.bos_token_id,)


def test_a_base_model_begins_with_its_begin_token(tokenizer: Any, model: Any) -> None:
    form = text_form(tokenizer, model, PROMPTS, 0)
    begin = tokenizer.bos_token_id
    assert set(form.beginnings) == {(begin,), *((begin, *ids(tokenizer, text)) for text in PROMPTS.openings)}
    assert form.closing == (tokenizer.eos_token_id,)


def test_without_special_tokens_openings_remain(tokenizer: Any, model: Any) -> None:
    tokenizer.bos_token = tokenizer.eos_token = None
    form = text_form(tokenizer, model, PROMPTS, 0)
    assert set(form.beginnings) == {ids(tokenizer, text) for text in PROMPTS.openings}


def test_the_order_is_the_seed_s(tokenizer: Any, model: Any) -> None:
    prompts = read_prompts(held_out=False)
    orders = [text_form(tokenizer, model, prompts, seed).beginnings for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


@pytest.mark.parametrize("template", ["{{ raise_exception('no users here') }}", "hello", "{% for %}"])
def test_a_template_that_cannot_be_used_is_an_error(template: str, tokenizer: Any, model: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(CalibrationError, match="chat template refuses a request") as caught:
        text_form(tokenizer, model, PROMPTS, 0)
    assert "--calibration pydoc" in str(caught.value.hint)


def test_places_for_images_are_never_written(tokenizer: Any, model: Any) -> None:
    config = model.config.to_dict() | {"image_token_id": 7, "vision_config": {"video_token_index": 9}}
    config |= {"bos_token_id": 0, "num_image_tokens": 11, "image_size": 13}
    twin = SimpleNamespace(
        config=SimpleNamespace(to_dict=lambda: config, get_text_config=lambda: model.config),
        get_input_embeddings=model.get_input_embeddings,
        generation_config=model.generation_config,
    )
    form = text_form(tokenizer, twin, PROMPTS, 0)
    assert {7, 9} <= set(form.forbidden)
    assert not {11, 13} & set(form.forbidden)


def test_another_model_s_tokenizer_is_an_error(tokenizer: Any, model: Any) -> None:
    small = SimpleNamespace(
        config=model.config,
        get_input_embeddings=lambda: torch.nn.Embedding(20, 4),
        generation_config=model.generation_config,
    )
    with pytest.raises(CalibrationError, match="embedding has 20 rows"):
        text_form(tokenizer, small, PROMPTS, 0)


def test_several_ends_of_the_generation_config(tiny_llama: Path, tmp_path: Path, model: Any) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = open_tokenizer(folder)
    several = SimpleNamespace(
        config=model.config,
        get_input_embeddings=model.get_input_embeddings,
        generation_config=SimpleNamespace(eos_token_id=[5, 6, 10**6]),
    )
    form = text_form(tokenizer, several, PROMPTS, 0)
    assert form.ends == {5, 6, tokenizer.eos_token_id}
    assert json.dumps(form.closing) == json.dumps([min(form.ends)])
