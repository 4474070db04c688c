"""A skeleton described by numbers: `ModelFacts`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gptq_cli.model.facts import LinearFact, ModelFacts, TensorFact, dtype_name
from gptq_cli.model.skeleton import LinearInfo, Skeleton
from gptq_cli.model.trace import Trace
from gptq_cli.results.kept import KeptDense


def model_facts(skeleton: Skeleton) -> ModelFacts:
    """The skeleton described by numbers."""
    model, config = skeleton.model, skeleton.config.get_text_config()
    traced = skeleton.trace
    stages = stage_numbers(traced, (*skeleton.linears, *skeleton.by_module))

    def fact(info: LinearInfo) -> LinearFact:
        return LinearFact(
            name=info.name,
            block=info.block,
            in_features=info.in_features,
            out_features=info.out_features,
            stage=stages.get(info.name, 0),
            routed=traced.complete and info.name in traced.idle and bool(info.block),
        )

    return ModelFacts(
        model=skeleton.ref.model,
        architecture=type(model).__name__,
        dtype=dtype_name(skeleton.dtype),
        hidden_size=int(config.hidden_size),
        vocab_size=int(getattr(config, "vocab_size", 0) or 0),
        max_positions=getattr(config, "max_position_embeddings", None),
        blocks=skeleton.blocks,
        modules=tuple(name for name, _ in model.named_modules() if name),
        order=traced.order if traced.complete else (),
        untraced=traced.problem,
        tensors=_tensors(model),
        tied=skeleton.tied,
        linears=tuple(fact(info) for info in skeleton.linears),
        head=fact(skeleton.head) if skeleton.head is not None else None,
        by_module=tuple(fact(info) for info in skeleton.by_module),
        kept=_kept(skeleton),
        dense_linears=tuple(skeleton.kept),
        fused=_fused(model, skeleton.blocks),
        already_quantized=skeleton.already_quantized,
        tensor_files_bytes=skeleton.files.size_bytes,
    )


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

    A linear that did not run is a stage of its own, after the others. Where the trace is not complete,
    linears with the same parent and the same K count as a stage, which at worst overestimates memory.
    """
    owner = {info.name: info.block for info in linears}
    if traced.complete:
        known = [[name for name in stage if name in owner] for stage in traced.stages]
        known += [[name] for name in owner if name in traced.idle]
    else:
        by_parent: dict[tuple[str, str, int], list[str]] = {}
        for info in linears:
            key = (info.block, info.name.rpartition(".")[0], info.in_features)
            by_parent.setdefault(key, []).append(info.name)
        known = list(by_parent.values())
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


def _fused(model: nn.Module, blocks: Sequence[str]) -> tuple[str, ...]:
    inside = tuple(f"{block}." for block in blocks)
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and name.startswith(inside) and parameter.shape[0] > 1
    )
