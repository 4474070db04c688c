"""A skeleton described by numbers: `ModelFacts`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from gptq_cli.model.beside import LEFT_OUT, is_surplus
from gptq_cli.model.blocks import is_linear
from gptq_cli.model.expert_linears import ExpertLinear, is_interleaved, is_together
from gptq_cli.model.facts import (
    BesideFact,
    LinearFact,
    ModelFacts,
    StackFact,
    TensorFact,
    dtype_name,
)
from gptq_cli.model.parallel import find_splits, head_counts
from gptq_cli.model.positions import stated_positions
from gptq_cli.model.skeleton import LinearInfo, Skeleton
from gptq_cli.model.text_part import uncalled_tensors
from gptq_cli.model.trace import Trace
from gptq_cli.results.kept import KeptDense


def model_facts(skeleton: Skeleton) -> ModelFacts:
    """The skeleton described by numbers."""
    model, config = skeleton.model, skeleton.config.get_text_config()
    traced = skeleton.trace
    stages = stage_numbers(traced, (*skeleton.linears, *skeleton.by_module))
    known = (*skeleton.packed, *skeleton.by_module)
    splits = find_splits(skeleton.config, ((x.name, x.in_features, x.out_features) for x in known))

    def fact(info: LinearInfo) -> LinearFact:
        return LinearFact(
            name=info.name,
            block=info.block,
            in_features=info.in_features,
            out_features=info.out_features,
            stage=stages.get(info.name, 0),
            routed=traced.complete and info.name in traced.idle and bool(info.block),
            split=splits[info.name],
            part_of=_part_of(model, info.name),
            source_name=info.source_name,
            interleaved=is_interleaved(model.get_submodule(info.name)),
            together=is_together(model.get_submodule(info.name)),
        )

    score_heads = _score_heads(config)
    return ModelFacts(
        model=skeleton.ref.model,
        architecture=type(model).__name__,
        dtype=dtype_name(skeleton.dtype),
        hidden_size=int(config.hidden_size),
        vocab_size=int(getattr(config, "vocab_size", 0) or 0),
        max_positions=stated_positions(config),
        blocks=skeleton.blocks,
        modules=tuple(module_names(model)),
        order=traced.order if traced.complete else (),
        untraced=traced.problem,
        between=traced.flow.between,
        obstacle=traced.flow.obstacle,
        tensors=_tensors(model),
        uncalled=uncalled_tensors(model, skeleton.blocks, head=skeleton.head is not None),
        tied=skeleton.tied,
        linears=tuple(fact(info) for info in skeleton.linears),
        head=fact(skeleton.head) if skeleton.head is not None else None,
        by_module=tuple(fact(info) for info in skeleton.by_module),
        kept=_kept(skeleton),
        routed_share=traced.routed_share,
        fused=tuple(StackFact(name, reason) for name, reason in skeleton.experts.dense.items()),
        shared=tuple(sorted(skeleton.shared)),
        dense_linears=_dense_linears(skeleton),
        heads=head_counts(skeleton.config),
        score_heads=score_heads,
        scores_kept=_scores_kept(model) if score_heads else 0,
        already_quantized=skeleton.already_quantized,
        decoded=skeleton.files.decoded,
        tensor_files_bytes=skeleton.files.size_bytes,
        beside=tuple(
            BesideFact(
                name=part.name,
                parameters=part.parameters,
                in_class=part.reason != LEFT_OUT,
                surplus=is_surplus(part, skeleton.files.tensors),
            )
            for part in skeleton.beside
        ),
    )


def _score_heads(config: Any) -> int:
    """`config`: of the text decoder. Transformers computes attention in single steps where the architecture
    asks for something that torch's own operator cannot do: a cap on the scores, a bias on each."""
    eager = getattr(config, "_attn_implementation", None) == "eager"
    return int(getattr(config, "num_attention_heads", 0) or 0) if eager else 0


def _scores_kept(model: nn.Module) -> int:
    """Measured: 1.3 where attention is a function of Transformers, of which a block keeps what it returns
    (Gemma 2); 3.3 where the block computes it itself and keeps every step (BLOOM)."""
    return 2 if getattr(model, "_supports_attention_backend", False) else 4


def _part_of(model: nn.Module, linear: str) -> str:
    module = model.get_submodule(linear)
    if not isinstance(module, ExpertLinear):
        return ""
    inside = module.tensor.linear(module.role, module.expert)
    return f"{linear.removesuffix(inside)}{module.tensor.leaf}"


def module_names(model: nn.Module) -> Iterator[str]:
    """Every named module without the root, and without the linears of fused experts: these have no tensors
    of their own to place."""
    for name, module in model.named_modules():
        below = list(module.children())
        linears = [child for child in below if isinstance(child, ExpertLinear)]
        holds_only_linears = bool(linears) and len(linears) == len(below) and not list(module.parameters())
        if name and not isinstance(module, ExpertLinear) and not holds_only_linears:
            yield name


def _kept(skeleton: Skeleton) -> tuple[KeptDense, ...]:
    """The linears of the blocks among the dense modules, with their reasons."""
    reasons = {*skeleton.kept.values(), "router", "converted at load"}
    return tuple(
        KeptDense(name=item.name, reason=item.reason, linears=item.modules, weights=item.parameters)
        for item in skeleton.dense
        if item.reason in reasons
    )


def stage_numbers(traced: Trace, linears: Sequence[LinearInfo]) -> dict[str, int]:
    """Number of the stage of each linear inside its block, in order of execution.

    Linears that did not run come after the others. Those with the same parent and the same K count as a
    stage, as gate and up of an expert are. Where the trace is not complete all linears are taken like this,
    which at worst overestimates memory.
    """
    owner = {info.name: info.block for info in linears}
    known = [[name for name in stage if name in owner] for stage in traced.stages] if traced.complete else []
    by_parent: dict[tuple[str, str, int], list[str]] = {}
    for info in linears:
        if not traced.complete or info.name in traced.idle:
            key = (info.block, info.name.rpartition(".")[0], info.in_features)
            by_parent.setdefault(key, []).append(info.name)
    known += by_parent.values()
    numbers: dict[str, int] = {}
    counts: dict[str, int] = {}
    for stage in filter(None, known):
        block = owner[stage[0]]
        numbers.update(dict.fromkeys(stage, counts.get(block, 0)))
        counts[block] = counts.get(block, 0) + 1
    return numbers


def _tensors(model: nn.Module) -> tuple[TensorFact, ...]:
    """Parameters and buffers in module order; a tied one under its first name."""
    found: list[tuple[str, Tensor, bool]] = [(name, p, False) for name, p in model.named_parameters()]
    found += [(name, b, True) for name, b in model.named_buffers()]
    rank = {name: index for index, (name, _) in enumerate(model.named_modules())}
    found.sort(key=lambda item: rank[item[0].rpartition(".")[0]])
    return tuple(
        TensorFact(name, t.numel(), t.numel() * t.element_size(), buffer) for name, t, buffer in found
    )


def _dense_linears(skeleton: Skeleton) -> tuple[str, ...]:
    """Linears of the blocks that stay dense, routers among them."""
    quantized = {linear.name for linear in skeleton.linears} | skeleton.shared
    return tuple(
        full
        for block in skeleton.blocks
        for name, module in skeleton.model.get_submodule(block).named_modules()
        if is_linear(module) and (full := f"{block}.{name}") not in quantized
    )
