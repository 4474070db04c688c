"""What a model's files hold beside its text decoder: towers, and layers that the model's class leaves out.

All of it is copied byte for byte. Towers (vision, sound, projectors) are modules of the class, and so are
decoder blocks that only an image reaches (Llama 3.2's cross-attention). Layers for multi-token prediction are
often in the files alone: the class ignores them, servers draft tokens with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import nn

from gptq_cli.errors import ModelError
from gptq_cli.model.conversion import KeyMap
from gptq_cli.model.facts import TensorInfo
from gptq_cli.model.fused import FusedExperts
from gptq_cli.model.model_class import names_with_towers
from gptq_cli.model.text_part import beside_the_text, language_model
from gptq_cli.model.trace import Trace

TOWER, LEFT_OUT = "beside the text decoder", "not in the model's class"
UNREACHED = "text does not reach it"


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideInfo:
    """One part of a model that is copied as a whole."""

    name: str
    """A tower's name in the model (`model.visual`); otherwise its name in the files (`mtp`)."""
    kind: str
    """Class name; "" where the class of the model does not have it."""
    reason: str
    """`TOWER`, `UNREACHED` or `LEFT_OUT`."""
    modules: int
    """Modules with parameters of their own."""
    parameters: int
    sources: tuple[str, ...]
    """Names of its tensors in the files."""


def has_towers(model: Any) -> bool:
    """Whether the model takes more than text."""
    names = names_with_towers(getattr(model.config, "model_type", ""))
    return type(model).__name__ in names or bool(beside_the_text(model))


def check_runs_on_text(source: str, model: Any, blocks: tuple[str, ...], traced: Trace) -> None:
    """Refuse (`ModelError`) a model with towers that does not continue a text by itself.

    One writes into a second input (block diffusion: `decoder_input_ids`); the forward without data of one
    that needs an image or a sound ends before its first block.
    """
    if has_towers(model) and "decoder_input_ids" in signature(language_model(model).forward).parameters:
        raise ModelError(
            f"{source} ({type(model).__name__}) does not continue its input token by token: its forward "
            "takes decoder_input_ids",
            hint="give a model whose decoder continues its own input",
        )
    if traced.complete or any(block in traced.order for block in blocks) or not has_towers(model):
        return
    raise ModelError(
        f"{source} ({type(model).__name__}) does not run on text alone: {traced.problem}",
        hint="the calibration is text, so a model that needs an image or a sound in every forward cannot be "
        "quantized",
    )


def unreached_linears(
    model: Any, linears: Mapping[str, str], experts: Iterable[FusedExperts], traced: Trace
) -> Iterator[str]:
    """Linears (name -> block) that only images or sounds reach, such as adapters and cross-attention: those
    that did not run and are not one of several experts; and all those of `experts` that were not called."""
    if not traced.complete or not has_towers(model):
        return
    for name, block in linears.items():
        inside = name.removeprefix(f"{block}.").split(".")
        if name in traced.idle and not any(part.isdigit() for part in inside):
            yield name
    for module in experts:
        if module.user not in traced.order:
            yield from (name for name, *_ in module.linears())


def parts_beside(
    model: nn.Module, unreached: Iterable[str], keys: KeyMap, tensors: Iterable[TensorInfo]
) -> tuple[BesideInfo, ...]:
    """Towers and blocks that text does not reach, in model order, then what the class leaves out, in the
    order of the files."""
    reasons = dict.fromkeys(beside_the_text(model), TOWER) | dict.fromkeys(unreached, UNREACHED)
    return (*_modules(model, reasons, keys), *_left_out(keys, tensors))


def _modules(model: nn.Module, reasons: Mapping[str, str], keys: KeyMap) -> Iterator[BesideInfo]:
    counted: set[int] = set()
    for name, reason in reasons.items():
        tower = model.get_submodule(name)
        own = {id(p): p for p in tower.parameters() if id(p) not in counted}
        counted |= own.keys()
        sources = [
            source
            for target, origin in keys.origins.items()
            if target.startswith(f"{name}.")
            for source in origin.sources
        ]
        yield BesideInfo(
            name=name,
            kind=type(tower).__name__,
            reason=reason,
            modules=sum(any(True for _ in m.parameters(recurse=False)) for m in tower.modules()),
            parameters=sum(p.numel() for p in own.values()),
            sources=tuple(dict.fromkeys(sources)),
        )


def _left_out(keys: KeyMap, tensors: Iterable[TensorInfo]) -> Iterator[BesideInfo]:
    """Whole modules of the files that the class has no place for; single tensors in a module that it has,
    such as masks in old checkpoints, and modules without a matrix, such as rotary tables, are none."""
    if not keys.unexpected:
        return
    known = {part for origin in keys.origins.values() for name in origin.sources for part in _owners(name)}
    by_name = {tensor.name: tensor for tensor in tensors}
    groups: dict[str, list[TensorInfo]] = {}
    for name in keys.unexpected:
        owner = next((part for part in _owners(name) if part not in known), None)
        if owner is not None and name in by_name:
            groups.setdefault(owner, []).append(by_name[name])
    for owner, found in groups.items():
        if any(len(tensor.shape) > 1 for tensor in found):
            yield BesideInfo(
                name=owner,
                kind="",
                reason=LEFT_OUT,
                modules=len({tensor.name.rpartition(".")[0] for tensor in found}),
                parameters=sum(math.prod(tensor.shape) for tensor in found),
                sources=tuple(tensor.name for tensor in found),
            )


def is_surplus(part: BesideInfo, tensors: Iterable[TensorInfo]) -> bool:
    """Whether a part that the class leaves out has the tensors of a block before it, by name and shape. A
    layer for multi-token prediction in the list of blocks has some of its own."""
    above, _, number = part.name.rpartition(".")
    if part.reason != LEFT_OUT or not number.isdigit():
        return False
    siblings: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for tensor in tensors:
        if tensor.name.startswith(f"{above}."):
            sibling, _, inside = tensor.name.removeprefix(f"{above}.").partition(".")
            siblings.setdefault(sibling, set()).add((inside, tensor.shape))
    own = siblings.pop(number, set())
    return any(k.isdigit() and int(k) < int(number) and held == own for k, held in siblings.items())


def _owners(name: str) -> Iterator[str]:
    """`a.b.c` -> `a`, `a.b`."""
    parts = name.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts)))
