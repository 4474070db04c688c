"""One forward without data: complete on every architecture and dtype, and honest where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, ZambaConfig

from gptq_cli.checkpoint.declared import declared_dynamic, modules_in_block
from gptq_cli.config import ModelRef
from gptq_cli.model.blocks import find_blocks
from gptq_cli.model.candidates import candidates_of, kept_dense, shared_linears
from gptq_cli.model.conversion import Conversion, tied_groups
from gptq_cli.model.meta import build_meta
from gptq_cli.model.skeleton import _linears
from gptq_cli.model.trace import Trace, trace
from tests.checkpoint.unquantized import opened
from tests.tiny import TINY

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
LATENT: dict[str, Any] = SMALL | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2MoeConfig", SMALL | {"num_experts": 4, "moe_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", SMALL | {"num_experts": 4, "moe_intermediate_size": 24}),
    "mixtral": ("MixtralConfig", SMALL | {"num_local_experts": 4}),
    "gpt_oss": ("GptOssConfig", SMALL | {"num_local_experts": 4, "head_dim": 16}),
    "deepseek_v2": ("DeepseekV2Config", LATENT | {"n_group": 1, "topk_group": 1}),
    "deepseek_v3": ("DeepseekV3Config", LATENT | {"n_group": 1, "topk_group": 1}),
    "llama4_text": (
        "Llama4TextConfig",
        SMALL
        | {"num_local_experts": 4, "head_dim": 16, "num_experts_per_tok": 1, "intermediate_size_mlp": 96},
    ),
    "olmoe": ("OlmoeConfig", SMALL | {"num_experts": 4}),
    "granitemoe": ("GraniteMoeConfig", SMALL | {"num_local_experts": 4}),
    "glm4_moe": (
        "Glm4MoeConfig",
        SMALL | {"n_routed_experts": 4, "moe_intermediate_size": 24, "head_dim": 16},
    ),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def traced(config: Any, dtype: torch.dtype) -> tuple[Any, dict[str, str], Trace]:
    model = build_meta(config, ModelRef(model="tiny"), dtype)
    blocks = find_blocks(model)[1]
    candidates = candidates_of(model, blocks)
    return model, candidates, trace(model, candidates, blocks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    kind, fields = EXPERTS[name]
    model, candidates, found = traced(getattr(transformers, kind)(**fields), dtype)
    assert (found.problem, found.complete) == ("", True)
    assert {linear for stage in found.stages for linear in stage} | found.idle == set(candidates)
    assert not found.idle, "experts of these are fused: every linear runs"
    assert found.order[-1] == "lm_head"
    assert {name for name, _ in model.named_modules() if name.endswith("experts")} <= set(found.order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TINY)
def test_every_tiny_architecture_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    _, candidates, found = traced(TINY[name](), dtype)
    assert found.problem == ""
    assert found.flow.direct, "no forward of these has to be kept open"
    assert {linear for stage in found.stages for linear in stage} == set(candidates)
    assert not found.read_not_called


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


NAMES = dict.fromkeys(("called", "read", "asked", "chosen"), "")


def peeking() -> Peeking:
    with torch.device("meta"):
        return Peeking()


def test_what_counts_as_reading() -> None:
    model = peeking()
    found = trace(model, NAMES)
    assert found.complete
    assert found.read_not_called == {"read"}
    assert found.idle == {"read", "asked", "chosen"}
    assert found.stages == (("called",),)
    assert found.order == ("embed", "called")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forward_that_fails_says_where_and_what_it_saw() -> None:
    model = peeking()
    with torch.device("meta"):
        model.chosen = nn.Linear(5, 5)
    model.forward = lambda input_ids, use_cache: model.chosen(model.embed(input_ids) @ model.read.weight)
    found = trace(model, NAMES)
    assert not found.complete
    assert found.problem.startswith("in chosen: RuntimeError: ")
    assert found.read_not_called == {"read"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_lack_of_memory_is_not_a_property_of_the_model() -> None:
    model = peeking()

    def fail(input_ids: Tensor, use_cache: bool) -> None:
        raise MemoryError

    model.forward = fail
    with pytest.raises(MemoryError):
        trace(model, NAMES)


ASKING = {
    "item": lambda x: x.sum().item() + x.sum().long().item(),
    "tolist": lambda x: x.argmax(-1).tolist(),
    "nonzero": lambda x: (x > 0).nonzero(as_tuple=True),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "mask of rows": lambda x: x[x.sum(-1) > 0] @ x.new_empty(x.shape[-1], 3),
    "masked write": lambda x: x.clone().index_put_((x > 0,), x.new_zeros(())),
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x),
    "unique": lambda x: x.argmax(-1).unique(return_counts=True),
    "unique rows": lambda x: torch.unique(x, dim=0),
    "unique_consecutive": lambda x: torch.unique_consecutive(x),
    "bincount": lambda x: torch.bincount(x.argmax(-1).flatten(), minlength=4),
    "histc": lambda x: torch.histc(x, bins=4, min=0, max=3),
    "repeat_interleave": lambda x: torch.repeat_interleave(x[0], x[0].argmax(-1), dim=0),
    "cpu": lambda x: x.cpu().tolist(),
    "split": lambda x: x[0].split(x[0].argmax(-1).tolist()),
    "grouped_mm": lambda x: torch._grouped_mm(
        x[0], x.new_empty(2, x.shape[-1], 6), offs=x.new_empty(2, dtype=torch.int32)
    ),
    "grouped_mm of batches": lambda x: torch._grouped_mm(x, x.new_empty(x.shape[0], x.shape[-1], 6)),
}


@pytest.mark.parametrize("asked", ASKING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_questions_for_values_are_answered(asked: str, dtype: torch.dtype) -> None:
    model = peeking().to(dtype)

    def forward(input_ids: Tensor, use_cache: bool) -> Tensor:
        ASKING[asked](model.embed(input_ids))
        return model.called(model.embed(input_ids))

    model.forward = forward
    assert trace(model, NAMES).problem == ""


def test_mamba(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    skeleton = opened(tmp_path / "mamba")
    names = {linear.name.rpartition(".")[2] for linear in skeleton.linears}
    assert names == {"in_proj", "x_proj", "out_proj"}
    (dense,) = [item for item in skeleton.dense if item.reason == "read, not called"]
    assert (dense.name, dense.modules) == ("backbone.layers.*.mixer.dt_proj", 2)
    assert list(declared_dynamic(skeleton)) == [r"-:(.*\.)?layers\.\d+\.mixer\.(conv1d|dt_proj)(\..*)?$"]
    assert modules_in_block(skeleton) == ("mixer.in_proj", "mixer.x_proj", "mixer.out_proj")


@pytest.mark.parametrize("copies", [False, True], ids=["one tensor", "copies"])
def test_shared_blocks(copies: bool) -> None:
    """Zamba's attention blocks are one set of weights under several names: listed once, where it runs first.
    Copies in the files may differ: they stay dense."""
    config = ZambaConfig(num_hidden_layers=18, hidden_size=64, intermediate_size=64, vocab_size=64)
    model = build_meta(config, ModelRef(model="zamba"), torch.bfloat16)
    blocks = find_blocks(model)[1]
    groups = tied_groups(model)
    left_out = set() if copies else {name for first, *others in groups for name in others}
    keys = Conversion(model).map(model.state_dict().keys() - left_out)
    candidates = candidates_of(model, blocks)
    traced = trace(model, candidates, blocks)
    shared = shared_linears(groups, candidates, keys, traced)
    kept = kept_dense(model, traced, candidates, groups, shared)
    linears = {x.name: x for x in _linears(model, blocks, keys, kept, shared=shared, known=False)}
    found = [linear for name, linear in linears.items() if "shared_transf" in name]
    if copies:
        assert (shared, found) == ({}, [])
        assert "tied" in kept.values()
        return
    first, *others = (i for i, kind in enumerate(config.layers_block_type) if kind == "hybrid")
    assert len(found) == 7
    assert {linear.block for linear in found} == {f"model.layers.{first}"}
    linear = linears[f"model.layers.{first}.shared_transf.self_attn.q_proj"]
    assert linear.also_at == tuple(f"model.layers.{i}.shared_transf.self_attn.q_proj" for i in others)
    assert "tied" not in kept.values()


def test_a_forward_leaves_nothing_behind() -> None:
    """Phi-3's long rotary frequencies are made by the forward, for the length that it sees."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }
    config = transformers.Phi3Config(
        **SMALL | {"pad_token_id": 1},
        max_position_embeddings=2048,
        original_max_position_embeddings=512,
        rope_parameters=rope | {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
    )
    model = build_meta(config, ModelRef(model="tiny"), torch.float32)
    leaving = LeavingBehind()
    kept = leaving.items[0]
    model.model.layers[0].mlp.activation_fn = leaving
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    found = trace(model, {}, find_blocks(model)[1])
    assert found.problem == ""
    assert leaving.calls == [], "a list is as it was"
    assert leaving.items == {0: kept}
    for module, attributes, buffers in before:
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[name] is value for name, value in attributes.items())
        assert module._buffers.keys() == buffers.keys()
        assert all(module._buffers[name] is value for name, value in buffers.items())


class LeavingBehind(nn.Module):
    """An activation that notes what it saw, in every way that a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Tensor] = []
        self.items: dict[int, Tensor] = {0: torch.ones(1)}
        self.register_buffer("last", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x)
        self.items[0] = x
        self.seen = x
        self.last = x
        self.register_buffer("new", x)
        return x
