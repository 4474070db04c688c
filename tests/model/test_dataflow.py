"""Routers and indexers are found by where their outputs go, whatever they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from gptq_cli.config import ModelRef
from gptq_cli.model.blocks import find_blocks
from gptq_cli.model.candidates import candidates_of, kept_dense
from gptq_cli.model.meta import build_meta
from gptq_cli.model.trace import Trace, trace
from gptq_cli.placement.names import fold
from tests.model.test_trace import EXPERTS, LATENT, SMALL, peeking
from tests.tiny import TINY

ROUTED = EXPERTS | {
    "jetmoe": ("JetMoeConfig", SMALL | {"num_local_experts": 4, "kv_channels": 16, "num_key_value_heads": 2}),
    "minimax": ("MiniMaxConfig", SMALL | {"num_local_experts": 4, "head_dim": 16}),
    "deepseek_v32": (
        "DeepseekV32Config",
        LATENT | {"n_group": 1, "topk_group": 1, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},
    ),
    "dbrx": (
        "DbrxConfig",
        {
            "vocab_size": 512,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
}
INDEXER = {f"self_attn.indexer.{name}" for name in ("wq_b", "wk", "weights_proj")}
CHOOSING: dict[str, set[str]] = {
    "jetmoe": {"mlp.router.layer", "self_attention.experts.router.layer"},
    "gpt_oss": {"mlp.router"},
    "granitemoe": {"block_sparse_moe.router"},
    "dbrx": {"ffn.router", "ffn.router.layer"},
    "llama4_text": {"feed_forward.router"},
    "deepseek_v32": {"mlp.gate"} | INDEXER,
}


def followed(config: Any) -> tuple[Any, dict[str, str], Trace]:
    model = build_meta(config, ModelRef(model="tiny"), torch.bfloat16)
    candidates = candidates_of(model, find_blocks(model)[1])
    return model, candidates, trace(model, candidates)


@pytest.mark.parametrize("name", ROUTED)
def test_what_chooses_in_models_with_experts(name: str) -> None:
    kind, fields = ROUTED[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"this Transformers has no {kind}")
    model, candidates, found = followed(getattr(transformers, kind)(**fields))
    assert found.problem == ""
    folded = {fold(choosing).split(".*.", 1)[1] for choosing in found.choosing}
    if name == "dbrx":
        assert folded
        assert folded <= CHOOSING[name]
    else:
        assert folded == CHOOSING.get(name, {"mlp.gate"})
    if name in ("qwen3_moe", "deepseek_v3", "jetmoe", "dbrx"):
        assert found.routed_share == 0.5
    kept = kept_dense(model, found, candidates, ())
    assert {kept[choosing] for choosing in found.choosing} == {"router"}


@pytest.mark.parametrize("name", [name for name in TINY if "moe" not in name and name != "mixtral"])
def test_nothing_chooses_in_other_models(name: str) -> None:
    found = followed(TINY[name]())[2]
    assert (found.choosing, found.routed_share) == (frozenset(), 1.0)


WIDTH, EXPERTS_HERE = 16, 4


class Parts(nn.Module):
    """Linears to be called in ways that each test brings; the last one is the way out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, WIDTH)
        self.q, self.k, self.v, self.wide, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.first, self.pick, self.noise = (
            nn.Linear(WIDTH, 8),
            nn.Linear(8, EXPERTS_HERE),
            nn.Linear(WIDTH, 4),
        )
        self.gate = nn.Linear(WIDTH, EXPERTS_HERE)


def chosen_in(body: Callable[[Parts, Tensor], Tensor]) -> set[str]:
    with torch.device("meta"):
        model: Any = Parts()
    model.forward = lambda input_ids, use_cache: model.last(body(model, model.embed(input_ids)))
    linears = {name: "" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = trace(model, linears)
    assert found.problem == ""
    return set(found.choosing)


def weighted(x: Tensor, values: Tensor) -> Tensor:
    return x + x * values.sum(-1, keepdim=True)


def routed(m: Parts, x: Tensor) -> Tensor:
    values, _ = m.gate(x).softmax(-1).topk(2)
    return weighted(x, values)


def gathered(m: Parts, x: Tensor) -> Tensor:
    """As DeepSeek: chosen by one score, weighted by another, groups masked before."""
    scores = m.gate(x).sigmoid()
    groups = scores.view(*x.shape[:-1], 2, 2).topk(1)[0].sum(-1).topk(1)[1]
    mask = torch.zeros(*x.shape[:-1], 2, device="meta").scatter_(-1, groups, 1).repeat_interleave(2, -1)
    indices = scores.masked_fill(mask == 0, 0.0).topk(1)[1]
    return weighted(x, scores.gather(-1, indices))


def masked(m: Parts, x: Tensor) -> Tensor:
    """The scores of all experts go on, those that were not picked as zeros."""
    scores = m.gate(x).softmax(-1)
    mask = F.one_hot(scores.argmax(-1), EXPERTS_HERE)
    return weighted(x, scores * mask)


def of_two(m: Parts, x: Tensor) -> Tensor:
    return weighted(x, m.pick(torch.relu(m.first(x))).topk(2)[0])


def noisy(m: Parts, x: Tensor) -> Tensor:
    indices = (m.gate(x) + m.noise(x) * 0.1).topk(1)[1]
    return x * indices


def all_of_them(m: Parts, x: Tensor) -> Tensor:
    """No expert is left out, but each is weighted."""
    return weighted(x, m.gate(x).softmax(-1))


def by_maximum(m: Parts, x: Tensor) -> Tensor:
    values, indices = m.gate(x).max(-1, keepdim=True)
    return x * values + indices


def indexed(m: Parts, x: Tensor) -> Tensor:
    """Queries and keys of their own pick the tokens; v is what they pick from."""
    tokens = (m.q(x) @ m.k(x).mT).relu().topk(2, dim=-1)[1]
    allowed = torch.full((8, 8), -torch.inf, device="meta").scatter(-1, tokens[0], 0.0)
    return (x @ x.mT + allowed).softmax(-1) @ m.v(x)


def indexed_by_blocks(m: Parts, x: Tensor) -> Tensor:
    """As MiniMax M3: what the values of the top-k are compared with decides which of its indices count."""
    values, blocks = (m.q(x) @ m.k(x).mT).view(1, 8, 4, 2).amax(-1).topk(2)
    kept = blocks.masked_fill(values == -torch.inf, 3)
    mask = torch.zeros(1, 8, 4, device="meta").scatter(-1, kept, 1.0).repeat_interleave(2, -1)
    return (x @ x.mT * mask).softmax(-1) @ m.v(x)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (routed, {"gate"}),
        (gathered, {"gate"}),
        (masked, {"gate"}),
        (of_two, {"first", "pick"}),
        (noisy, {"gate", "noise"}),
        (all_of_them, {"gate"}),
        (by_maximum, {"gate"}),
        (indexed, {"q", "k"}),
        (indexed_by_blocks, {"q", "k"}),
    ],
)
def test_what_chooses(body: Callable[[Parts, Tensor], Tensor], expected: set[str]) -> None:
    assert chosen_in(body) == expected


def gated(m: Parts, x: Tensor) -> Tensor:
    """Called like a router, and none."""
    return weighted(x, m.gate(x).sigmoid())


def attention(m: Parts, x: Tensor) -> Tensor:
    return (m.q(x) @ m.k(x).mT).softmax(-1) @ m.v(x)


def stabilised(m: Parts, x: Tensor) -> Tensor:
    """The maximum is subtracted; nobody reads where it was."""
    scores = m.gate(x)
    return weighted(x, (scores - scores.max(-1, keepdim=True)[0]).exp())


def picking_by_its_own_queries(m: Parts, x: Tensor) -> Tensor:
    scores = m.q(x) @ m.k(x).mT
    mask = torch.zeros_like(scores).scatter(-1, scores.topk(2)[1], 1.0)
    return (scores * mask).softmax(-1) @ m.v(x)


def sparse(m: Parts, x: Tensor) -> Tensor:
    """The largest activations of a wide linear go on."""
    inner = m.wide(x)
    return torch.zeros_like(inner).scatter(-1, *reversed(inner.topk(4)))


def before_a_router(m: Parts, x: Tensor) -> Tensor:
    """What comes from another linear before the router goes on beside it."""
    x = x + m.v(x)
    return routed(m, F.layer_norm(x, (WIDTH,))) + x


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (gated, set()),
        (attention, set()),
        (stabilised, set()),
        (picking_by_its_own_queries, set()),
        (sparse, set()),
        (before_a_router, {"gate"}),
    ],
)
def test_what_does_not_choose(body: Callable[[Parts, Tensor], Tensor], expected: set[str]) -> None:
    assert chosen_in(body) == expected


def test_a_forward_that_stops_shows_what_it_saw_and_names_are_taken_for_the_rest() -> None:
    model: Any = peeking()
    with torch.device("meta"):
        model.gate, model.layer, model.before = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(input_ids: Tensor, use_cache: bool) -> Tensor:
        model.layer(model.before(model.embed(input_ids))).topk(1)
        raise ValueError("stopped")

    model.forward = forward
    candidates = dict.fromkeys(("called", "gate", "layer", "before"), "")
    found = trace(model, candidates)
    assert not found.complete
    assert found.choosing == {"layer"}, "what else `before` would have reached is not known"
    assert kept_dense(model, found, candidates, ()) == {"layer": "router", "gate": "router"}


def test_gates_of_one_output_stay_dense() -> None:
    model, candidates, found = followed(transformers.Qwen2MoeConfig(**EXPERTS["qwen2_moe"][1]))
    kept = {fold(name) for name, why in kept_dense(model, found, candidates, ()).items() if why == "router"}
    assert kept == {"model.layers.*.mlp.gate", "model.layers.*.mlp.shared_expert_gate"}
