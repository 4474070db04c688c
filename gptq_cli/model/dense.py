"""What stays dense in a model, and why: modules folded over the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from gptq_cli.model.beside import LEFT_OUT, BesideInfo
from gptq_cli.model.blocks import is_linear
from gptq_cli.model.experts import FoundExperts, stacked_parameters
from gptq_cli.model.text_part import output_head
from gptq_cli.placement.names import fold, in_blocks, parents

BIASES = "biases of experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseInfo:
    """Modules that keep their weights, folded over the blocks that they are in; tensors, of a module of which
    other parts are quantized."""

    name: str
    """`model.layers.*.input_layernorm`; where not all that are alike stay dense, or not for one reason,
    `model.layers.0,2-3.mlp.down_proj`."""
    kind: str
    """Class name."""
    reason: str
    """embedding | head | router | tied | read, not called | converted at load | outside the blocks | vector |
    biases of experts | convolution | no linear | not computed matrix by matrix (of three dimensions: see
    `FoundExperts.dense`), and those of `beside` and `results.kept`"""
    modules: int
    """Number of modules, or tensors, under the folded name."""
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
    beside: tuple[BesideInfo, ...],
    total: int,
) -> tuple[DenseInfo, ...]:
    """The modules of `model` beside the linears `quantized`. `kept`: linears that stay dense -> why; `total`:
    parameters of the files."""
    packed = {
        f"{module.name}.{tensor.leaf}"
        for module in experts.experts
        for tensor in module.tensors
        if all(name in quantized for name in module.linears_of(tensor))
    }
    together = {
        module.name: next((kept[name] for name, *_ in module.linears() if name in kept), "")
        for module in experts.experts
    }
    head = output_head(model)
    towers = {part.name for part in beside if part.reason != LEFT_OUT}
    below_blocks = tuple(f"{block}." for block in blocks)
    counted: set[int] = set()
    holders = {holder for name in quantized for holder in parents(name)}
    folded: dict[tuple[str, str], _Alike] = {}
    seen: dict[str, set[str]] = {}  # folded name -> the modules that are quantized or dense
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if inside := [id(p) for leaf, p in own.items() if f"{name}.{leaf}" in packed]:
            counted.update(inside)
            seen.setdefault(fold(name), set()).add(name)
        if any(above in towers for above in (name, *parents(name))):
            continue
        left = {leaf: p for leaf, p in own.items() if id(p) not in counted}
        counted.update(id(p) for p in own.values())
        if not left:
            continue
        seen.setdefault(fold(name), set()).add(name)
        if name in quantized:
            continue
        for part, parameters in _parts(name, left, partly=bool(inside) or name in holders):
            reason = kept.get(name) or together.get(name)
            if not reason:
                biases = name in together and max(p.ndim for p in parameters) < 3
                in_block = name.startswith(below_blocks)
                reason = BIASES if biases else _reason(module, parameters, head, in_block=in_block)
            seen.setdefault(fold(part), set()).add(part)
            alike = folded.setdefault((fold(part), reason), _Alike(type(module).__name__))
            alike.names.append(part)
            alike.parameters += sum(p.numel() for p in parameters)
    found = [
        (
            name if len(alike.names) == len(seen[name]) else _in_blocks(alike.names, blocks),
            alike.kind,
            reason,
            len(alike.names),
            alike.parameters,
        )
        for (name, reason), alike in folded.items()
    ]
    found += [(part.name, part.kind, part.reason, part.modules, part.parameters) for part in beside]
    return tuple(
        DenseInfo(
            name=name,
            kind=kind,
            reason=reason,
            modules=modules,
            parameters=parameters,
            share=parameters / max(1, total),
        )
        for name, kind, reason, modules, parameters in found
    )


def _parts(
    name: str, left: Mapping[str, nn.Parameter], *, partly: bool
) -> list[tuple[str, list[nn.Parameter]]]:
    """A module, or each of its tensors where a part of it is quantized."""
    if partly:
        return [(f"{name}.{leaf}", [parameter]) for leaf, parameter in left.items()]
    return [(name, list(left.values()))]


@dataclass(slots=True)
class _Alike:
    """Modules of one folded name that stay dense for one reason."""

    kind: str
    names: list[str] = field(default_factory=list)
    parameters: int = 0


def _in_blocks(names: Sequence[str], blocks: tuple[str, ...]) -> str:
    known = set(blocks)
    return in_blocks((next((x for x in (name, *parents(name)) if x in known), ""), name) for name in names)


def _reason(module: nn.Module, own: Sequence[nn.Parameter], head: nn.Module | None, *, in_block: bool) -> str:
    """Why the parameters `own` of a module stay dense, where no linear of it was looked at."""
    if module is head:
        return "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if max(p.ndim for p in own) < 2:
        return "vector"
    if isinstance(module, _ConvNd):
        return "convolution"
    if not in_block:
        return "outside the blocks"
    if stacked_parameters(module):
        return "not computed matrix by matrix"
    return "converted at load" if is_linear(module) else "no linear"
