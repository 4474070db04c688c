"""What stays dense in a model, and why: modules folded over the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from gptq_cli.model.blocks import ROUTER_NAMES, is_linear, is_router
from gptq_cli.model.experts import FoundExperts, stacked_parameters
from gptq_cli.placement.names import fold, leaf


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseInfo:
    """Modules that keep their weights, folded over the blocks: `model.layers.*.input_layernorm`."""

    name: str
    kind: str
    """Class name."""
    reason: str
    """embedding | head | fused experts | router | tied | read, not called | converted at load |
    outside the blocks | vector | other"""
    modules: int
    """Number of modules under the folded name."""
    parameters: int
    """Of all of them together; a tied tensor counts once."""
    share: float
    """Part of the model's parameters, 0 to 1."""


def fold_dense(
    model: Any,
    quantized: Set[str],
    blocks: tuple[str, ...],
    kept: Mapping[str, str],
    experts: FoundExperts,
) -> tuple[DenseInfo, ...]:
    """The modules of `model` beside the linears `quantized`. `kept`: linears that stay dense -> why."""
    packed = {
        f"{module.name}.{tensor.leaf}"
        for module in experts.experts
        for tensor in module.tensors
        if quantized.issuperset(module.linears_of(tensor))
    }
    head = model.get_output_embeddings()
    total = max(1, sum(p.numel() for p in model.parameters()))
    inside = tuple(f"{block}." for block in blocks)
    counted: set[int] = set()
    folded: dict[str, tuple[str, str, int, int]] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        counted.update(id(p) for leaf, p in own.items() if f"{name}.{leaf}" in packed)
        if all(id(p) in counted for p in own.values()):
            continue
        if name in quantized:
            counted.update(id(p) for p in own.values())
            continue
        size = sum(p.numel() for p in own.values() if id(p) not in counted)
        counted.update(id(p) for p in own.values())
        reason = kept.get(name) or _reason(name, module, head, name.startswith(inside))
        kind, reason, modules, parameters = folded.get(fold(name), (type(module).__name__, reason, 0, 0))
        folded[fold(name)] = (kind, reason, modules + 1, parameters + size)
    return tuple(
        DenseInfo(
            name=name,
            kind=kind,
            reason=reason,
            modules=modules,
            parameters=parameters,
            share=parameters / total,
        )
        for name, (kind, reason, modules, parameters) in folded.items()
    )


def _reason(name: str, module: nn.Module, head: nn.Module | None, in_block: bool) -> str:
    dimensions = [p.ndim for p in module.parameters(recurse=False)]
    if module is head:
        return "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if in_block and stacked_parameters(module):
        return "fused experts"
    if in_block and leaf(name) in ROUTER_NAMES:
        return "router"
    if max(dimensions) < 2:
        return "vector"
    if is_linear(module):
        if is_router(name, module):
            return "router"
        return "converted at load" if in_block else "outside the blocks"
    return "other"
