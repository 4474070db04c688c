"""Linears whose weight is read rather than called stay dense; so do linears that share a weight."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, ZambaConfig

from gptq_cli.config import ModelRef
from gptq_cli.model.blocks import find_blocks
from gptq_cli.model.conversion import Conversion, tied_groups
from gptq_cli.model.plan import dense_patterns, modules_in_block
from gptq_cli.model.skeleton import _kept_dense, _linears, build_meta
from gptq_cli.model.usage import read_not_called
from tests.model.checkpoints import opened


class Peeking(nn.Module):
    """Calls `called`, multiplies with `read`, asks `asked` for its dtype, lets `chosen` depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.called, self.read, self.asked, self.chosen = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x = self.called(self.embed(input_ids))
        x = (x @ self.read.weight).to(self.asked.weight.dtype)
        for index in (x > 0).nonzero():
            x = self.chosen(x[index])
        return x if x.sum() > 0 else x + 1


def test_what_counts_as_reading() -> None:
    with torch.device("meta"):
        model = Peeking()
    assert read_not_called(model, ["called", "read", "asked", "chosen"]) == {"read"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forward_that_fails_still_says_what_it_saw() -> None:
    with torch.device("meta"):
        model = Peeking()
        model.chosen = nn.Linear(5, 5)
    model.forward = lambda input_ids, use_cache: model.chosen(model.embed(input_ids) @ model.read.weight)
    assert read_not_called(model, ["read", "chosen"]) == {"read"}


def test_mamba(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    skeleton = opened(tmp_path / "mamba")
    names = {linear.name.rpartition(".")[2] for linear in skeleton.linears}
    assert names == {"in_proj", "x_proj", "out_proj"}
    (dense,) = [item for item in skeleton.dense if item.reason == "read, not called"]
    assert (dense.name, dense.modules) == ("backbone.layers.*.mixer.dt_proj", 2)
    assert r"backbone\.layers\.\d+\.mixer\.dt_proj(\..*)?$" in dense_patterns(skeleton)
    assert modules_in_block(skeleton) == ("mixer.in_proj", "mixer.x_proj", "mixer.out_proj")


def test_shared_blocks() -> None:
    """Zamba's attention blocks are one set of weights under several names."""
    model = build_meta(ZambaConfig(), ModelRef(model="zamba"), torch.bfloat16)
    blocks = find_blocks(model)[1]
    keys = Conversion(model).map(model.state_dict())
    kept = _kept_dense(model, blocks, tied_groups(model))
    linears = list(_linears(model, blocks, keys, kept, known=False))
    assert "tied" in kept.values()
    assert not any("shared_transf" in linear.name for linear in linears)
    assert sum(x.in_features * x.out_features for x in linears) < sum(p.numel() for p in model.parameters())
