"""Which part of the weights of a model's decoder blocks is quantized."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from gptq_cli.model.beside import UNREACHED
from gptq_cli.placement.names import fold, owner
from gptq_cli.results.kept import KeptDense


def decoder_lists(model: Any, blocks: Collection[str]) -> tuple[str, ...]:
    """`blocks`, and all other modules of their classes: a model may have a second stack of them (HRM)."""
    kinds = {type(model.get_submodule(name)) for name in blocks}
    others = (name for name, module in model.named_modules() if type(module) in kinds)
    return tuple(dict.fromkeys((*blocks, *others)))


def block_weights(model: Any, blocks: Collection[str], kept: Iterable[KeptDense]) -> int:
    """The two- and three-dimensional weights in all decoder blocks that text reaches; a shared one counts
    once."""
    inside = tuple(f"{name}." for name in decoder_lists(model, blocks))
    unreached = {item.name for item in kept if item.reason == UNREACHED}
    sizes = {
        id(parameter): parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim in (2, 3) and name.startswith(inside) and fold(owner(name)) not in unreached
    }
    return max(1, sum(sizes.values()))
