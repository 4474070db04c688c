"""Rows written side by side: whole turns, the model's own distribution, the same text every time."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_cli.calibration import open_tokenizer, writing
from gptq_cli.calibration.prompts import read_prompts
from gptq_cli.calibration.text_form import TextForm, text_form
from gptq_cli.calibration.writing import MIN_ANSWER, cache_to_write_with, check_decoding, write_rows
from gptq_cli.errors import CalibrationError, NonFinite
from gptq_cli.model.running import CACHE_NAMES
from tests.tiny import tiny_model

END, AFTER, BOS = 1, 2, 0
FORM = TextForm(
    beginnings=((BOS, 10, 11), (BOS, 12, 13, 14), (BOS, 15)),
    closing=(END, AFTER),
    ends=frozenset({END}),
    forbidden=(3, BOS),
    vocabulary=16,
)


class Scripted(nn.Module):
    """Predicts the next token from the last one and the number of tokens before it."""

    def __init__(self, logits: Tensor) -> None:  # (vocabulary, vocabulary)
        super().__init__()
        self.embedding = nn.Embedding(len(logits), 1)
        self.table, self.steps = logits, 0

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        self.steps += 1
        return SimpleNamespace(logits=self.table[input_ids], past_key_values=past_key_values or "cache")


def _forward_with(name: str, counted: list[int]) -> Any:
    """A forward that names its cache `name`, and keeps in it how many tokens it has seen."""

    def run(self: Scripted, input_ids: Tensor, kept: int | None) -> Any:
        counted.append(kept or 0)
        return SimpleNamespace(**{"logits": self.table[input_ids], name: (kept or 0) + 1})

    def cache(self: Any, input_ids: Tensor, cache: int | None = None, use_cache: bool = False) -> Any:
        return run(self, input_ids, cache)

    def past_key_values(
        self: Any, input_ids: Tensor, past_key_values: int | None = None, use_cache: bool = False
    ) -> Any:
        return run(self, input_ids, past_key_values)

    def cache_params(
        self: Any, input_ids: Tensor, cache_params: int | None = None, use_cache: bool = False
    ) -> Any:
        return run(self, input_ids, cache_params)

    return {made.__name__: made for made in (cache, past_key_values, cache_params)}[name]


def likes(*tokens: int) -> Tensor:
    """Logits of a model that writes these tokens, equally often."""
    table = torch.full((20, 20), -20.0)
    table[:, list(tokens)] = 2.0
    return table


def turns(row: list[int], own: list[bool]) -> list[tuple[list[int], list[int]]]:
    """(beginning, answer with its closing) of a row."""
    found: list[tuple[list[int], list[int]]] = []
    for token, mine in zip(row, own, strict=True):
        if token == BOS:
            found.append(([], []))
        closing = token in (END, AFTER)
        found[-1][1 if mine or closing else 0].append(token)
    return found


def test_a_row_is_full_of_whole_turns() -> None:
    ids, own = write_rows(Scripted(likes(4, 5, 6, 7, END)), FORM, range(6), 6, 90, 0)
    assert ids.shape == own.shape == (6, 90)
    used = set()
    for row, mine in zip(ids.tolist(), own.tolist(), strict=True):
        parts = turns(row, mine)
        assert len(parts) >= 4
        used |= {tuple(part[0]) for part in parts}
        for beginning, answer in parts:
            assert tuple(beginning) in FORM.beginnings
            assert answer[-2:] == [END, AFTER]
            assert set(answer[:-2]) <= {4, 5, 6, 7}
        assert len(parts[-1][1]) >= MIN_ANSWER  # where nothing fitted any more, the answer went on
    assert used == set(FORM.beginnings)


def test_an_answer_that_does_not_end_is_closed_at_the_end_of_the_row() -> None:
    ids, own = write_rows(Scripted(likes(4, 5)), FORM, range(2), 2, 40, 0)
    assert ids[:, -2:].tolist() == [[END, AFTER]] * 2
    assert own[:, -2:].sum() == 0
    assert own[:, 6:-2].all()


def test_forbidden_tokens_and_those_past_the_vocabulary_are_not_written() -> None:
    ids, own = write_rows(Scripted(torch.zeros(20, 20)), FORM, range(4), 4, 120, 0)
    assert not set(ids[own].tolist()) & {3, BOS, 16, 17, 18, 19}


def test_tokens_are_drawn_from_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "TEMPERATURES", (1.0,))
    table = torch.full((20, 20), -torch.inf)
    shares = torch.tensor([0.5, 0.3, 0.2])
    table[:, 4:7] = shares.log()
    ids, own = write_rows(Scripted(table), FORM, range(40), 40, 200, 0)
    found = torch.bincount(ids[own], minlength=7)[4:7].double()
    assert torch.allclose(found / found.sum(), shares.double(), atol=0.03)


def test_temperatures_are_mixed() -> None:
    table = torch.full((20, 20), -20.0)
    table[:, 4], table[:, 5] = 1.0, 0.0
    ids, own = write_rows(Scripted(table), FORM, range(4), 4, 1000, 0)
    rare = [float((row[mine] == 5).double().mean()) for row, mine in zip(ids, own, strict=True)]
    assert max(rare) - min(rare) > 0.08  # 0.16 at 0.6, 0.30 at 1.2


def test_the_same_seed_writes_the_same_and_batches_do_not_depend_on_those_before() -> None:
    model = Scripted(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))
    whole = write_rows(model, FORM, range(4), 8, 50, 7)[0]
    assert torch.equal(whole, write_rows(model, FORM, range(4), 8, 50, 7)[0])
    assert not torch.equal(whole, write_rows(model, FORM, range(4), 8, 50, 8)[0])
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    later = write_rows(model, FORM, range(4, 8), 8, 50, 7)[0]
    assert torch.equal(state, torch.random.get_rng_state())  # the global generator is left alone
    assert not torch.equal(later, whole)


def test_one_step_for_each_token_of_a_row() -> None:
    model = Scripted(likes(4))
    seen: list[int] = []
    write_rows(model, FORM, range(3), 3, 12, 0, seen.append)
    assert seen == [3] * 12
    assert model.steps == 11  # nothing follows the last token


def test_a_row_without_room_for_a_request_is_cut() -> None:
    ids, own = write_rows(Scripted(likes(4)), FORM, range(1), 1, 2, 0)
    assert tuple(ids[0].tolist()) == (BOS, 15)
    assert not own.any()


def test_numbers_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(NonFinite, match="while it writes"):
        write_rows(Scripted(torch.full((20, 20), torch.nan)), FORM, range(1), 1, 12, 0)


class TestRealModels:
    @pytest.mark.parametrize(
        "name", ["llama", "gpt2", "gemma2", "gemma3_text", "opt", "bloom", "qwen3_moe", "mixtral", "gpt_neox"]
    )
    def test_what_a_model_writes_is_what_it_predicts(
        self, name: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writing, "TEMPERATURES", (0.002,))  # nearly greedy
        model, tokenizer = tiny_model(name).eval(), open_tokenizer(tiny_llama)
        form = text_form(tokenizer, model, read_prompts(held_out=False), 0)
        check_decoding(model, form)
        ids, own = write_rows(model, form, range(2), 2, 48, 0)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1, : form.vocabulary]
            logits[..., [*form.forbidden, *form.ends]] = -torch.inf
            greedy = logits.argmax(-1)
        answers = own[:, 1:]
        assert answers.sum() > 30
        assert (greedy == ids[:, 1:])[answers].double().mean() > 0.9

    def test_a_cache_that_is_wrong_is_found(self, tiny_llama: Path) -> None:
        model, tokenizer = tiny_model("llama").eval(), open_tokenizer(tiny_llama)
        form = text_form(tokenizer, model, read_prompts(held_out=False), 0)
        real = model.forward

        @functools.wraps(real)
        def forgetful(input_ids: Tensor, use_cache: bool = False, **_: Any) -> Any:
            return real(input_ids=input_ids, use_cache=use_cache)

        model.forward = forgetful
        with pytest.raises(CalibrationError, match="something else with its cache than without"):
            check_decoding(model, form)

    @pytest.mark.parametrize("name", CACHE_NAMES)
    def test_the_cache_goes_by_the_name_that_the_model_has_for_it(self, name: str) -> None:
        """Transformers has had three."""
        counted: list[int] = []

        class Named(Scripted):
            forward = _forward_with(name, counted)

        ids, _ = write_rows(Named(likes(4)), FORM, range(1), 1, 12, 0)
        assert ids.shape == (1, 12)
        assert counted == list(range(11))  # what each step was given is what the one before it returned

    def test_a_model_without_a_cache_is_refused(self) -> None:
        class NoCache(Scripted):
            def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
                return SimpleNamespace(logits=self.table[input_ids])

        with pytest.raises(CalibrationError, match="NoCache cannot write text: its forward takes no cache"):
            cache_to_write_with(NoCache(likes(4)))

    def test_a_model_that_does_not_generate_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Scripted, "can_generate", lambda self: False)
        with pytest.raises(CalibrationError, match="Scripted cannot write text"):
            cache_to_write_with(Scripted(likes(4)))

    def test_a_model_that_gives_no_cache_back_is_refused(self) -> None:
        class Forgets(Scripted):
            def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
                return SimpleNamespace(logits=self.table[input_ids])

        with pytest.raises(CalibrationError, match="Forgets returns no cache"):
            write_rows(Forgets(likes(4)), FORM, range(1), 1, 12, 0)
