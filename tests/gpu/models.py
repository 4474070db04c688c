"""Random models whose memory can be measured: small for every device, medium for a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny import VOCAB, save_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Some megabytes: tensors count beside what is rounded, and a run takes seconds on a slow CPU."""


def save_random(path: Path, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    """A random Llama with the tiny tokenizer: some hundred megabytes, or as `fields` say."""
    shape: dict[str, Any] = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    assert shape["vocab_size"] >= VOCAB
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape | fields))
    model = model.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
            else:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path
