"""Fused experts: found by structure, proven on a tiny copy, and computed by linears that are views."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call

from gptq_cli.errors import ModelError
from gptq_cli.model.blocks import assign, find_blocks, find_linears
from gptq_cli.model.expert_linears import ExpertLinear, drop_parameters, hollow, unfuse
from gptq_cli.model.experts import find_experts
from gptq_cli.model.fused import FusedTensor, as_matrices
from tests.model.test_trace import EXPERTS, SMALL
from tests.tiny import randomize

JETMOE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "kv_channels": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
NEMOTRON: dict[str, Any] = SMALL | {
    "layers_block_type": ["moe", "moe"],
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
}
DBRX: dict[str, Any] = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "vocab_size": 512,
    "max_seq_len": 128,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
}
MODELS = EXPERTS | {
    "dbrx": ("DbrxConfig", DBRX),
    "jetmoe": ("JetMoeConfig", JETMOE),
    "nemotron_h": ("NemotronHConfig", NEMOTRON),
    "minimax": ("MiniMaxConfig", SMALL | {"num_local_experts": 4, "head_dim": 16}),
}
IDS = torch.randint(2, 500, (2, 12), generator=torch.Generator().manual_seed(3))


def model_of(name: str) -> Any:
    kind, fields = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**fields)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, 0)
    return model.eval().requires_grad_(False)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_the_linears_compute_what_the_fused_module_computes(name: str) -> None:
    model = model_of(name)
    blocks = find_blocks(model)[1]
    expected, parameters = logits(model), dict(model.named_parameters())
    found = find_experts(model, blocks)
    assert found.dense == {}
    assert found.experts
    unfuse(model, found.experts)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert torch.allclose(logits(model), expected, atol=2e-4, rtol=1e-4)
    assert torch.allclose(logits(copy.deepcopy(model)), expected, atol=2e-4, rtol=1e-4)

    (linear, *_) = [m for m in model.modules() if isinstance(m, ExpertLinear)]
    linear.weight.zero_()
    parameter = linear.owner.get_parameter(linear.tensor.leaf)
    held = as_matrices(parameter, linear.tensor.experts)[linear.expert]
    assert int((held == 0).sum()) == linear.in_features * linear.out_features
    called: list[Tensor] = []
    linears = [m for m in model.modules() if isinstance(m, ExpertLinear)]
    for one in linears:
        one.register_forward_pre_hook(lambda _, args: called.append(args[0]))
    logits(model)
    assert called
    assert all(x.dim() == 2 and len(x) < IDS.numel() for x in called), "experts see the routed tokens only"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3_moe", (("gate_proj", "up_proj"), False, False, None)),
        ("gpt_oss", (("gate_proj", "up_proj"), True, True, "gate_up_proj_bias")),
        ("llama4_text", (("gate_proj", "up_proj"), True, False, None)),
        ("nemotron_h", (("up_proj",), False, False, None)),
        ("jetmoe", (("",), False, False, None)),
    ],
)
def test_how_the_matrices_are_stored(
    name: str, expected: tuple[tuple[str, ...], bool, bool, str | None]
) -> None:
    first, *_ = find_experts(model_of(name), ("model.layers.0",)).experts
    tensor = first.tensors[0]
    assert (tensor.roles, tensor.transposed, tensor.interleaved, tensor.bias) == expected


def test_a_weight_is_a_view_of_its_part() -> None:
    model = model_of("gpt_oss")
    unfuse(model, find_experts(model, ("model.layers.0",)).experts)
    module = model.model.layers[0].mlp.experts
    up = module.get_submodule("2.up_proj")
    assert torch.equal(up.weight, module.gate_up_proj[2, :, 1::2].T)
    assert up.weight.data_ptr() == module.gate_up_proj[2, :, 1::2].data_ptr()
    assign(up, torch.full((128, 64), 0.5))
    assert bool((module.gate_up_proj[2, :, 1::2] == 0.5).all())
    assert not bool((module.gate_up_proj[2, :, ::2] == 0.5).any())
    module.gate_up_proj = nn.Parameter(torch.ones_like(module.gate_up_proj), requires_grad=False)
    assert bool((up.weight == 1).all()), "the view follows the parameter"
    assert [name for name in find_linears(model.model.layers[0]) if ".2." in name] == [
        "mlp.experts.2.gate_proj",
        "mlp.experts.2.up_proj",
        "mlp.experts.2.down_proj",
    ]


def test_another_implementation_of_experts_cannot_take_the_place_of_the_linears() -> None:
    model = model_of("qwen3_moe")
    expected = logits(model)
    unfuse(model, find_experts(model, ("model.layers.0", "model.layers.1")).experts)
    model.set_experts_implementation("batched_mm")
    assert torch.allclose(logits(model), expected, atol=2e-4, rtol=1e-4)


def test_parameters_can_be_dropped_once_the_linears_are_replaced() -> None:
    model = model_of("mixtral")
    expected = logits(model)
    unfuse(model, find_experts(model, ("model.layers.0",)).experts)
    module = model.model.layers[0].mlp.experts
    for name, linear in list(module.named_modules()):
        if isinstance(linear, ExpertLinear):
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
            plain.weight.data = linear.weight.clone()
            module.set_submodule(name, plain)
    drop_parameters(module)
    assert not list(module.named_parameters(recurse=False))
    assert torch.allclose(logits(model), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_hollow_model_computes_with_the_weights_that_it_is_given(name: str) -> None:
    model = model_of(name)
    model.set_experts_implementation("eager")
    embeds = model.get_input_embeddings()(IDS).requires_grad_()
    expected = model(inputs_embeds=embeds, use_cache=False).logits
    expected.square().sum().backward()
    wanted, embeds.grad = embeds.grad, None
    unfuse(model, find_experts(model, find_blocks(model)[1]).experts)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, ExpertLinear)}
    stacks = {(m.owner, m.tensor.leaf) for m in linears.values()}
    weights = {f"{n}.weight": m.weight.clone().requires_grad_() for n, m in linears.items()}
    hollow(model, linears)
    assert all(model.get_submodule(n).weight.is_meta for n in linears)
    assert not any(leaf in owner._parameters for owner, leaf in stacks)
    found = functional_call(model, weights, (), {"inputs_embeds": embeds, "use_cache": False}).logits
    assert torch.allclose(found, expected, atol=2e-4, rtol=1e-4)
    found.square().sum().backward()
    assert wanted is not None
    torch.testing.assert_close(embeds.grad, wanted, atol=1e-3 * float(wanted.abs().max()), rtol=1e-3)
    reached = {n for n, w in weights.items() if w.grad is not None and bool(w.grad.any())}
    assert {n.split(".")[-2] for n in reached} == {n.split(".")[-2] for n in weights}


def test_a_parameter_is_hollow_as_a_whole_or_not_at_all() -> None:
    model = model_of("mixtral")
    unfuse(model, find_experts(model, find_blocks(model)[1]).experts)
    linears = [n for n, m in model.named_modules() if isinstance(m, ExpertLinear)]
    downs = [name for name in linears if name.endswith("down_proj")]
    hollow(model, downs)
    experts = model.model.layers[0].mlp.experts
    assert list(experts._parameters) == ["gate_up_proj"]
    with pytest.raises(ModelError, match="gate_proj is not quantized, though others"):
        hollow(model, [name for name in linears if name.endswith("up_proj")])


@pytest.mark.parametrize("name", MODELS)
def test_which_experts_are_multiplied_all_at_once(name: str) -> None:
    model = model_of(name)
    found = find_experts(model, find_blocks(model)[1]).experts
    assert {t.together for one in found for t in one.tensors} == {name == "llama4_text"}


class Experts(nn.Module):
    """A module of fused experts; subclasses differ in what they compute."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.width = 4, 32
        self.down = nn.Parameter(torch.randn(4, 32, 32))

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(index == expert)
            y = self.product(hidden_states[token], expert)
            out.index_add_(0, token, y * weights[token, slot, None])
        return out

    def product(self, x: Tensor, expert: int) -> Tensor:
        return x @ self.down[expert]


class Stacked(Experts):
    """Reads all matrices at once."""

    def product(self, x: Tensor, expert: int) -> Tensor:
        return x @ torch.softmax(self.down, 0)[expert]


class Scaled(Experts):
    """Reads a matrix beside the product."""

    def product(self, x: Tensor, expert: int) -> Tensor:
        return x @ self.down[expert] / self.down[expert].norm()


class Lookup(Experts):
    """Never multiplies."""

    def product(self, x: Tensor, expert: int) -> Tensor:
        return x * expert


def block_of(module: nn.Module) -> nn.Module:
    model = nn.Module()
    model.block = nn.Module()
    model.block.experts = module
    return model.to("meta")


def test_experts_that_no_library_knows() -> None:
    (found,) = find_experts(block_of(Experts()), ("block",)).experts
    assert found.tensors == (
        FusedTensor(
            leaf="down", experts=4, in_features=32, out_features=32, transposed=True, roles=("down",)
        ),
    )


class Stacks(nn.Module):
    """Two dimensions: the rows of one expert after those of another. Subclasses take them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.inner, self.width = 4, 24, 32
        self.up = nn.Parameter(torch.randn(4 * 24, 32))
        self.down = nn.Parameter(torch.randn(4 * 24, 32))

    def matrix(self, stack: Tensor, expert: int) -> Tensor:
        return stack.view(self.num_experts, self.inner, self.width)[expert]

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(index == expert)
            inner = hidden_states[token] @ self.matrix(self.up, expert).T
            y = inner.relu() @ self.matrix(self.down, expert)
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


class Chunks(Stacks):
    """By `chunk`."""

    def matrix(self, stack: Tensor, expert: int) -> Tensor:
        return stack.chunk(self.num_experts)[expert]


class Splits(Stacks):
    """By `split`."""

    def matrix(self, stack: Tensor, expert: int) -> Tensor:
        return torch.split(stack, self.inner, dim=0)[expert]


class Rows(Stacks):
    """By a range of rows."""

    def matrix(self, stack: Tensor, expert: int) -> Tensor:
        return stack[expert * self.inner : (expert + 1) * self.inner]


class Unbound(Stacks):
    """By `unbind`, after a view."""

    def matrix(self, stack: Tensor, expert: int) -> Tensor:
        return stack.reshape(self.num_experts, -1, self.width).unbind(0)[expert]


class Shifted(Stacks):
    """By rows that are not those of one expert."""

    def matrix(self, stack: Tensor, expert: int) -> Tensor:
        return stack.roll(1, 0)[expert * self.inner : (expert + 1) * self.inner]


class Held(Stacks):
    """Is given the matrices by the module above it."""

    def forward(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return x.matmul(up.T).relu() @ down


class Above(nn.Module):
    """Takes the matrices out of the parameters of a module inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.held = Held()
        self.num_experts = 4

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(index == expert)
            up = self.held.up.view(-1, self.held.inner, self.held.width)[expert]
            down = self.held.down.view(-1, self.held.inner, self.held.width)[expert]
            y = self.held(hidden_states[token], up, down)
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


@pytest.mark.parametrize("kind", [Stacks, Chunks, Splits, Rows, Unbound, Above])
def test_stacks_of_two_dimensions(kind: type[nn.Module]) -> None:
    module = kind()
    given = (torch.randn(5, 32), torch.tensor([[0, 2]] * 4 + [[1, 3]]), torch.rand(5, 2))
    with torch.no_grad():
        expected = module(*given)
    model = nn.Module()
    model.block = nn.Module()
    model.block.experts = module.requires_grad_(False)
    (found,) = find_experts(copy.deepcopy(model).to("meta"), ("block",)).experts
    assert found.user == "block.experts"
    assert found.name == ("block.experts.held" if kind is Above else "block.experts")
    assert [(t.leaf, t.experts, t.in_features, t.out_features, t.transposed) for t in found.tensors] == [
        ("up", 4, 32, 24, False),
        ("down", 4, 24, 32, True),
    ]
    unfuse(model, [found])
    linears = [m for m in model.modules() if isinstance(m, ExpertLinear)]
    assert len(linears) == 8
    called: list[int] = []
    for linear in linears:
        linear.register_forward_pre_hook(lambda m, args: called.append(m.expert))
    assert torch.allclose(module(*given), expected, atol=1e-4)
    assert called == [0, 0, 1, 1, 2, 2, 3, 3]
    linears[0].weight.zero_()
    holder = module.held if kind is Above else module
    assert int((holder.up == 0).sum()) == 24 * 32


def test_rows_of_several_experts_are_no_stack() -> None:
    found = find_experts(block_of(Shifted()), ("block",))
    assert (found.experts, found.dense) == ((), {})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Stacked, "in softmax"), (Scaled, "norm"), (Lookup, "multiplies with no slices of its parameters")],
)
def test_what_is_not_proven_stays_dense(kind: type[Experts], reason: str) -> None:
    found = find_experts(block_of(kind()), ("block",))
    assert found.experts == ()
    assert list(found.dense) == ["block.experts.down"]
    assert reason in found.dense["block.experts.down"]


def test_convolutions_are_no_experts() -> None:
    convolution = nn.Conv1d(8, 8, 4, groups=2)
    assert convolution.weight.ndim == 3
    found = find_experts(block_of(convolution), ("block",))
    assert (found.experts, found.dense) == ((), {})


def test_a_use_that_was_not_foreseen_is_an_error() -> None:
    model = block_of(Experts())
    unfuse(model, find_experts(model, ("block",)).experts)
    experts = model.to_empty(device="cpu").block.experts
    experts.product = lambda x, expert: x * experts.down[expert].sum()
    with pytest.raises(ModelError, match=r"Experts uses the parameters of its experts in .*sum"):
        experts(torch.randn(3, 32), torch.tensor([[0], [1], [2]]), torch.ones(3, 1))
