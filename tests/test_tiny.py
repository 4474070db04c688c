"""The tiny models are real: they open, they are the same every time, and their Hessians are not white."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import TinyFactory
from tests.tiny import TINY, save_tiny


@pytest.mark.parametrize("name", sorted(TINY))
def test_opens_and_says_something_sensible(name: str, tiny: TinyFactory) -> None:
    path = tiny(name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "The statement returns a value; lambda x: x + 1"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, use_cache=False)
    assert out.logits.isfinite().all()
    assert all(0.1 < float(h.std()) < 20 for h in out.hidden_states)
    assert 0.3 < float(out.logits.std()) < 20


def test_two_makings_are_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for folder in ("a", "b"):
        path = save_tiny("llama", tmp_path / folder)
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(path.iterdir())})
    assert digests[0] == digests[1]


def test_shards(tiny_llama_sharded: Path) -> None:
    assert len(list(tiny_llama_sharded.glob("*.safetensors"))) == 3
    assert (tiny_llama_sharded / "model.safetensors.index.json").is_file()


def test_columns_are_correlated(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    hidden = model.get_input_embeddings().weight.detach()
    correlation = torch.corrcoef(hidden.T)
    off_diagonal = correlation - torch.diag(correlation.diag())
    assert float(off_diagonal.abs().max()) > 0.5
