"""What a model's files hold beside its text decoder: towers, and layers that the model's class leaves out.

Both are copied byte for byte. Towers (vision, sound, projectors) are modules of the class. Layers for
multi-token prediction are often in the files alone: the class ignores them, servers draft tokens with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from gptq_cli.model.conversion import KeyMap
from gptq_cli.model.facts import TensorInfo
from gptq_cli.model.text_part import beside_the_text

TOWER, LEFT_OUT = "beside the text decoder", "not in the model's class"


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideInfo:
    """One part of a model that is copied as a whole."""

    name: str
    """A tower's name in the model (`model.visual`); otherwise its name in the files (`mtp`)."""
    kind: str
    """Class name; "" where the class of the model does not have it."""
    reason: str
    """`TOWER` or `LEFT_OUT`."""
    modules: int
    """Modules with parameters of their own."""
    parameters: int
    sources: tuple[str, ...]
    """Names of its tensors in the files."""


def parts_beside(model: nn.Module, keys: KeyMap, tensors: Iterable[TensorInfo]) -> tuple[BesideInfo, ...]:
    """Towers in model order, then what the class leaves out, in the order of the files."""
    return (*_towers(model, keys), *_left_out(keys, tensors))


def _towers(model: nn.Module, keys: KeyMap) -> Iterator[BesideInfo]:
    counted: set[int] = set()
    for name, tower in beside_the_text(model).items():
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
            reason=TOWER,
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


def _owners(name: str) -> Iterator[str]:
    """`a.b.c` -> `a`, `a.b`."""
    parts = name.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts)))
