"""Models as plain facts, of any size, without torch: what the rules see."""

from __future__ import annotations

from dataclasses import replace

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.model.facts import LinearFact, ModelFacts, TensorFact
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.placement.placement import parse_inventory
from gptq_cli.planning.cases import MapCase, Work
from gptq_cli.preflight.resolve import Resolution, resolve

GIB = 1 << 30


def llama(
    blocks: int = 12,
    hidden: int = 1024,
    inner: int = 4096,
    vocab: int = 32000,
    *,
    tied: bool = False,
    dtype: str = "bfloat16",
) -> ModelFacts:
    """A Llama: embedding, rotary buffers, blocks of seven linears and two norms, a norm, a head."""
    size = 4 if dtype == "float32" else 2
    tensors = [TensorFact("model.embed_tokens.weight", vocab * hidden, vocab * hidden * size)]
    modules, linears = ["model", "model.embed_tokens", "model.layers"], []
    shapes = {
        "self_attn.q_proj": (hidden, hidden, 0),
        "self_attn.k_proj": (hidden, hidden, 0),
        "self_attn.v_proj": (hidden, hidden, 0),
        "self_attn.o_proj": (hidden, hidden, 1),
        "mlp.gate_proj": (hidden, inner, 2),
        "mlp.up_proj": (hidden, inner, 2),
        "mlp.down_proj": (inner, hidden, 3),
    }
    names = [f"model.layers.{index}" for index in range(blocks)]
    for block in names:
        modules += [block, f"{block}.self_attn", f"{block}.mlp", f"{block}.input_layernorm"]
        for name, (columns, rows, stage) in shapes.items():
            full = f"{block}.{name}"
            modules.append(full)
            tensors.append(TensorFact(f"{full}.weight", columns * rows, columns * rows * size))
            linears.append(
                LinearFact(name=full, block=block, in_features=columns, out_features=rows, stage=stage)
            )
        tensors.append(TensorFact(f"{block}.input_layernorm.weight", hidden, hidden * size))
    modules += ["model.norm", "model.rotary_emb", "lm_head"]
    tensors.append(TensorFact("model.norm.weight", hidden, hidden * size))
    tensors.append(TensorFact("model.rotary_emb.inv_freq", 32, 128, buffer=True))
    if not tied:
        tensors.append(TensorFact("lm_head.weight", vocab * hidden, vocab * hidden * size))
    return ModelFacts(
        model="org/llama",
        architecture="LlamaForCausalLM",
        dtype=dtype,
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=4096,
        blocks=tuple(names),
        modules=tuple(modules),
        order=("model", "model.embed_tokens", "model.rotary_emb", *names, "model.norm", "lm_head"),
        tensors=tuple(tensors),
        uncalled=frozenset() if tied else frozenset({"lm_head.weight"}),
        tied=(("model.embed_tokens.weight", "lm_head.weight"),) if tied else (),
        linears=tuple(linears),
    )


SMALL_WORK = Work(QuantizeConfig(solve_for="own", group_size=128), CalibrationConfig(samples=32, seq_len=512))
BIG = "cuda:0=24GiB,cuda:1=24GiB,cpu=64GiB"


def mixture(experts: int, hidden: int, inner: int, blocks: int = 2) -> ModelFacts:
    """A Llama whose MLP are experts, of which two see each token."""
    base = llama(blocks, hidden, inner)
    parts = (("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden))
    routed = [
        LinearFact(
            name=f"{block}.mlp.experts.{expert}.{name}",
            block=block,
            in_features=columns,
            out_features=rows,
            stage=2 + 2 * expert + (name == "down_proj"),
            routed=True,
        )
        for block in base.blocks
        for expert in range(experts)
        for name, columns, rows in parts
    ]
    tensors = [
        TensorFact(f"{x.name}.weight", x.in_features * x.out_features, 2 * x.in_features * x.out_features)
        for x in routed
    ]
    return replace(
        base,
        linears=(*(x for x in base.linears if ".mlp." not in x.name), *routed),
        tensors=(*(x for x in base.tensors if ".mlp." not in x.name), *tensors),
        modules=(*(x for x in base.modules if ".mlp." not in x), *(x.name for x in routed)),
        routed_share=2 / experts,
    )


def case(
    spec: str = "auto",
    facts: ModelFacts | None = None,
    devices: str = BIG,
    *,
    max_memory: str | None = None,
    work: Work | None = SMALL_WORK,
) -> MapCase:
    """A map case on a described machine."""
    return MapCase(
        spec=DeviceMap.parse(spec),
        facts=facts or llama(),
        budgets=parse_inventory(devices),
        max_memory=MaxMemory.parse(max_memory) if max_memory else None,
        work=work,
        given=True,
    )


def resolved(
    spec: str = "auto",
    facts: ModelFacts | None = None,
    devices: str = BIG,
    *,
    max_memory: str | None = None,
    work: Work | None = SMALL_WORK,
) -> Resolution:
    """The same, resolved."""
    made = case(spec, facts, devices, max_memory=max_memory, work=work)
    return resolve(made.spec, made.facts, made.budgets, max_memory=made.max_memory, work=work, given=True)


def rules_of(resolution: Resolution, level: str | None = None) -> list[str]:
    """Ids of the findings, of one level or of all."""
    return [f.rule for f in resolution.report.findings if level is None or f.level == level]


def without(facts: ModelFacts, tensor: str) -> ModelFacts:
    """The same model without one tensor."""
    return replace(facts, tensors=tuple(t for t in facts.tensors if t.name != tensor))
