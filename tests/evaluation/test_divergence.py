"""KL, top-1 and both perplexities against their definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from gptq_cli.config import ModelRef
from gptq_cli.errors import CheckpointError, NonFinite
from gptq_cli.evaluation import perplexity as perplexity_module
from gptq_cli.evaluation.divergence import check_comparable, compare
from gptq_cli.model.find import find_model
from gptq_cli.model.skeleton import open_skeleton
from tests.evaluation.test_perplexity import Bigram, by_definition


@pytest.mark.parametrize("elements", [1, 25, 1 << 24])
def test_the_definitions(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity_module, "LOGIT_ELEMENTS", elements)
    dense, quantized = torch.randn(9, 9), torch.randn(9, 9)
    windows = torch.randint(0, 9, (4, 6))
    found = compare(Bigram(quantized), Bigram(dense), windows)
    rows = windows.flatten()
    p, q = dense[rows].double().log_softmax(1), quantized[rows].double().log_softmax(1)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-5)
    assert found.top1 == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert found.perplexity == pytest.approx(by_definition(quantized, windows), rel=1e-5)
    assert found.dense_perplexity == pytest.approx(by_definition(dense, windows), rel=1e-5)
    assert found.perplexity_gap == pytest.approx(found.perplexity / found.dense_perplexity - 1)
    assert (found.tokens, found.windows) == (24, 4)


def test_only_answers_are_counted() -> None:
    dense, quantized = torch.randn(9, 9), torch.randn(9, 9)
    windows = torch.randint(0, 9, (3, 6))
    answers = torch.tensor([[True, False, True, True, False, False], [False] * 6, [False] * 5 + [True]])
    found = compare(Bigram(quantized), Bigram(dense), windows, answers=answers)
    seen = torch.stack([windows[0, 1], windows[0, 2], windows[2, 4]])  # each predicts the next, an answer's
    wanted = torch.stack([windows[0, 2], windows[0, 3], windows[2, 5]])
    p, q = dense[seen].double().log_softmax(1), quantized[seen].double().log_softmax(1)
    assert found.tokens == 3
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-5)
    assert found.perplexity == pytest.approx(float((-q.gather(1, wanted[:, None]).mean()).exp()), rel=1e-5)
    alone = perplexity_module.perplexity(Bigram(quantized), windows, answers=answers)
    assert (alone.tokens, alone.value) == (3, pytest.approx(found.perplexity, rel=1e-5))


def test_a_model_agrees_with_itself() -> None:
    model = Bigram(torch.randn(9, 9))
    found = compare(model, model, torch.randint(0, 9, (2, 5)))
    assert (found.kl, found.top1, found.perplexity_gap) == (0.0, 1.0, 0.0)


def test_other_vocabularies_cannot_be_compared() -> None:
    with pytest.raises(CheckpointError, match="knows 9 tokens, the dense one 8"):
        compare(Bigram(torch.randn(9, 9)), Bigram(torch.randn(8, 8)), torch.zeros(1, 4, dtype=torch.long))


def test_not_a_number_is_an_error() -> None:
    bad = torch.full((5, 5), float("nan"))
    with pytest.raises(NonFinite, match="window 0"):
        compare(Bigram(bad), Bigram(torch.zeros(5, 5)), torch.zeros(1, 4, dtype=torch.long))


def skeleton_of(**fields: object) -> object:
    """A Llama, or another class by `cls`, on the meta device."""
    cls = fields.pop("cls", "LlamaConfig")
    base = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    }
    with torch.device("meta"):
        config = getattr(transformers, str(cls))(**(base | fields))
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"cls": "MistralConfig"}, "the quantized model is a llama, the dense one a mistral"),
        ({"num_hidden_layers": 3}, "the quantized model has 2 blocks, the dense one 3"),
        ({"hidden_size": 32}, "the quantized model has hidden size 64, the dense one 32"),
        ({"vocab_size": 320}, "the quantized model knows 256 tokens, the dense one 320"),
        (
            {"intermediate_size": 96},
            r"mlp.gate_proj.weight is \[128, 64\] in a block .*, \[96, 64\] in the dense",
        ),
        ({"num_key_value_heads": 4}, "self_attn.k_proj.weight is"),
        (
            {"attention_bias": True},
            "a block of the dense model has self_attn.k_proj.bias, none of the quantized",
        ),
        (
            {"num_hidden_layers": 1, "vocab_size": 64},
            "has 2 blocks, the dense one 1; the quantized model knows 256 tokens, the dense one 64",
        ),
    ],
)
def test_other_models_are_told_apart(fields: dict[str, object], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        check_comparable(skeleton_of(), skeleton_of(**fields))


def test_the_same_model_is_comparable_however_it_is_dressed() -> None:
    check_comparable(skeleton_of(), skeleton_of(tie_word_embeddings=True, max_position_embeddings=64))


def test_other_vocabularies_are_found_before_a_weight_is_read(tiny_llama: Path) -> None:
    ref = ModelRef(model=str(tiny_llama))
    ours, theirs = (open_skeleton(find_model(ref), ref).model for _ in range(2))
    check_comparable(ours, theirs)
    theirs.set_input_embeddings(torch.nn.Embedding(8, 4, device="meta"))
    with pytest.raises(CheckpointError, match="knows 512 tokens, the dense one 8"):
        check_comparable(ours, theirs)
