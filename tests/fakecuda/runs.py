"""`gptq quantize` through the real `main`, and what it left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.e2e.commands import FAST, Ran, gptq

BLOCKS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "gemma2": "model.layers",
    "qwen3_moe": "model.layers",
    "mixtral": "model.layers",
    "qwen3_vl": "model.language_model.layers",
}
"""Where the blocks of each tiny model are. `llama` has three, the others two."""
OUTER = {
    "llama": ("model.embed_tokens",),
    "gpt2": ("transformer.wte", "lm_head"),
    "gemma2": ("model.embed_tokens", "lm_head"),
    "qwen3_moe": ("model.embed_tokens", "lm_head"),
    "mixtral": ("lm_head",),
    "qwen3_vl": ("model.visual", "model.language_model.embed_tokens"),
}
"""What may go to cpu from outside the blocks: tied tensors together."""


@dataclass(frozen=True)
class Quantized:
    """A run that ended well."""

    out: Path
    ran: Ran

    @property
    def report(self) -> Any:
        """report.json."""
        return json.loads((self.out / "report.json").read_text(encoding="utf-8"))

    @property
    def devices(self) -> list[str]:
        """The devices of the placement."""
        return list(self.report["devices"])

    @property
    def events(self) -> list[Any]:
        """Of a run with `--progress jsonl`."""
        return [json.loads(line) for line in self.ran.stderr.splitlines()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the checkpoint."""
        found: dict[str, torch.Tensor] = {}
        for shard in sorted(self.out.glob("*.safetensors")):
            found |= load_file(shard)
        return found


Reference = Callable[..., Quantized]
"""`reference(model, *options)`: see conftest.py."""


def group_size_for(name: str) -> int:
    """A group size that divides every linear of a tiny model."""
    return 16 if name == "qwen3_vl" else 32


def words_for(model: Path, out: Path, text: Path, *more: object) -> tuple[object, ...]:
    """The words of a short `gptq quantize`; `more` wins over what stands here."""
    return ("quantize", model, "--out", out, "--calibration", text, *FAST, *more)


def quantize(model: Path, out: Path, text: Path, *more: object) -> Quantized:
    """`gptq quantize`, which must end well."""
    ran = gptq(*words_for(model, out, text, *more))
    assert ran.code == 0, ran.stderr
    return Quantized(out, ran)


def different(a: Quantized, b: Quantized) -> list[str]:
    """The tensors in which two checkpoints differ."""
    ours, theirs = a.tensors(), b.tensors()
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]
