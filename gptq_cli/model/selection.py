"""Which linears are quantized under a configuration, and why the others are not.

`open_skeleton` knows what a model has; what is left dense depends on the settings too. Dense are, with the
reason as data:

* what `--module NAME=dense` names;
* linears whose output only gates (`model.gates`), unless a `--module` names them themselves;
* linears that cannot be packed at their bits and group, where they are too small to matter. One that
  matters stays, so that preflight refuses it, and so do all where no other is left: a model is not to end up
  dense unnoticed;
* linears of fused experts of which another part stays dense: their tensor is quantized whole or not at all.

The head is quantized where it is asked for and is a linear; a head that is tied to the embedding becomes a
linear of its own in the checkpoint, and the embedding stays dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from gptq_cli.config import AUTO_GROUPS, QuantizeConfig
from gptq_cli.model.blocks import is_linear, shape
from gptq_cli.model.dense import fold_dense
from gptq_cli.model.expert_names import linears_in_part
from gptq_cli.model.facts import can_be_packed
from gptq_cli.model.skeleton import LinearInfo, Skeleton
from gptq_cli.model.text_part import output_head
from gptq_cli.module_settings import settings_for
from gptq_cli.placement.names import fold
from gptq_cli.results.kept import BY_MODULE, GATES, IN_PART, TOO_SMALL

NEGLIGIBLE_SHARE = 0.01
"""Of the weights of a block's linears: what has less, all its likes together, may stay dense by itself."""
SMALLEST_SIDE = 32
"""A linear with fewer rows or columns than this is no matrix that a group or a word of zeros could fill."""


def select_linears(skeleton: Skeleton, config: QuantizeConfig) -> Skeleton:
    """The skeleton with the linears that `config` quantizes; the others are in `kept` with the reason."""
    head = _head(skeleton) if config.quantize_head else None
    config = config.for_model(
        [(info.name, info.in_features) for info in _decisive(skeleton)], head.name if head else None
    )
    kept = dict(skeleton.kept)
    by_module = []
    small = _negligible(skeleton.linears)
    unfit = {
        x.name for x in skeleton.linears if x.name in small and not _packable(x, config.of_linear(x.name))
    }
    if all(info.name in unfit for info in skeleton.linears if _may_be_quantized(skeleton, config, info)):
        unfit = set()
    for info in skeleton.linears:
        own = settings_for(config.modules, info.name)
        if own.dense:
            kept[info.name] = BY_MODULE
            by_module.append(info)
        elif info.name in skeleton.trace.gating and not own.named:
            kept[info.name] = GATES
        elif info.name in unfit and not own.named:
            kept[info.name] = TOO_SMALL
    quantized = {info.name for info in skeleton.linears if info.name not in kept}
    kept |= dict.fromkeys(linears_in_part(skeleton.experts, quantized) & quantized, IN_PART)
    linears = tuple(info for info in skeleton.linears if info.name not in kept)
    if head is not None and settings_for(config.modules, head.name).dense:
        head = None
    chosen = replace(skeleton, linears=linears, head=head, by_module=tuple(by_module), kept=kept)
    replaced = linears if chosen.head_is_tied else chosen.packed
    dense = fold_dense(
        skeleton.model,
        {name for info in replaced for name in (info.name, *info.also_at)},
        skeleton.blocks,
        kept,
        skeleton.experts,
        skeleton.beside,
        skeleton.parameters,
    )
    name = head.name if head is not None else ""  # a tied one is listed beside the embedding
    return replace(chosen, dense=tuple(item for item in dense if item.name != name))


def _may_be_quantized(skeleton: Skeleton, config: QuantizeConfig, info: LinearInfo) -> bool:
    """Whether neither its settings nor what its output is for leave it dense."""
    own = settings_for(config.modules, info.name)
    return not own.dense and (own.named or info.name not in skeleton.trace.gating)


def _packable(info: LinearInfo, own: QuantizeConfig) -> bool:
    return can_be_packed(info.in_features, info.out_features, own.bits, own.group_columns)


def _decisive(skeleton: Skeleton) -> Iterator[LinearInfo]:
    """The linears that "auto" has to find a group size for: all but gates, and small ones that none fits."""
    small = _negligible(skeleton.linears)
    for info in skeleton.linears:
        odd = info.name in small and info.in_features % AUTO_GROUPS[-1]
        if not odd and info.name not in skeleton.trace.gating:
            yield info


def _negligible(linears: Iterable[LinearInfo]) -> frozenset[str]:
    """Linears too small to matter: fewer than `SMALLEST_SIDE` rows or columns, or with all of their likes in
    the block less than `NEGLIGIBLE_SHARE` of its weights."""
    blocks: dict[str, dict[str, list[LinearInfo]]] = {}
    for info in linears:
        blocks.setdefault(info.block, {}).setdefault(fold(info.name), []).append(info)
    found: set[str] = set()
    for kinds in blocks.values():
        sizes = {kind: sum(x.in_features * x.out_features for x in held) for kind, held in kinds.items()}
        total = sum(sizes.values())
        for kind, held in kinds.items():
            narrow = min(held[0].in_features, held[0].out_features) < SMALLEST_SIDE
            if narrow or sizes[kind] < NEGLIGIBLE_SHARE * total:
                found.update(info.name for info in held)
    return frozenset(found)


def _head(skeleton: Skeleton) -> LinearInfo | None:
    """The output head as a linear; None where the model has none that is one."""
    module: Any = output_head(skeleton.model)
    if not isinstance(module, nn.Module) or not is_linear(module):
        return None
    name = next(name for name, one in skeleton.model.named_modules() if one is module)
    key = f"{name}.weight"
    tied = any(key in group for group in skeleton.tied)
    own = {tensor.name for tensor in skeleton.files.tensors}
    source = (key if key in own else None) if tied else skeleton.keys.source_of(key)
    rows, columns = shape(module)
    return LinearInfo(
        name=name,
        block="",
        source_key=source or key,
        in_features=columns,
        out_features=rows,
        bias=getattr(module, "bias", None) is not None,
        transposed=isinstance(module, Conv1D),
    )


def changed_settings(skeleton: Skeleton, config: QuantizeConfig) -> Mapping[str, Mapping[str, int | bool]]:
    """Source name -> changed fields of every linear that differs from the rest; the head by its own name."""
    found = {info.source_name: config.changed(info.name) for info in skeleton.packed}
    return {name: fields for name, fields in found.items() if fields}
