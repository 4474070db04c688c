"""What tensor parallelism would divide in a model: outputs or inputs of each linear, and which heads.

Transformers says it for most models (`base_model_tp_plan`: "colwise", "rowwise"). Where its plan is silent,
as about single experts, the shapes tell: the linears of one module that write into the residual stream, whose
N is the hidden size, are divided by inputs ("row"), the others by outputs ("column"). Servers do it in this
way. Low-rank linears, as `q_a_proj` of DeepSeek, are not divided at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from gptq_cli.model.facts import HeadCounts, Split
from gptq_cli.placement.names import fold, owner

_PLANNED: Mapping[str, Split] = {
    "colwise": "column",
    "packed_colwise": "column",
    "rowwise": "row",
    "rowwise_split_input": "row",
    "packed_rowwise": "row",
}
"""Styles of Transformers. Others, as `colwise_gather_output`, are its own ways, which servers do not take."""
_LINEAR_ATTENTION = {
    "linear_num_key_heads": "key heads of linear attention",
    "linear_num_value_heads": "value heads of linear attention",
}


def find_splits(config: Any, linears: Iterable[tuple[str, int, int]]) -> dict[str, Split]:
    """How each linear (name, K, N) of a model is divided. `config`: the model's."""
    text = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None) or {}
    planned = {fold(name): _PLANNED[style] for name, style in plan.items() if style in _PLANNED}
    modules: dict[str, list[tuple[str, int, int]]] = {}
    for linear in linears:
        modules.setdefault(owner(linear[0]), []).append(linear)
    result: dict[str, Split] = {}
    for held in modules.values():
        shapes = _by_shape(held, int(getattr(text, "hidden_size", 0) or 0))
        for name, _, _ in held:
            ends = _ends(fold(name))
            result[name] = next((planned[end] for end in ends if end in planned), shapes[name])
    return result


def _ends(name: str) -> Iterable[str]:
    """`a.b.c`, `b.c`, `c`."""
    words = name.split(".")
    return (".".join(words[start:]) for start in range(len(words)))


def _by_shape(held: list[tuple[str, int, int]], hidden: int) -> dict[str, Split]:
    """The linears of one module."""
    writers = [linear for linear in held if linear[2] == hidden]
    inner = [linear for linear in writers if linear[1] != hidden] or writers[-1:]
    rows = {name for name, _, _ in inner} if len(held) > 1 else set()
    others = [linear for linear in held if linear[0] not in rows]
    deep = [linear for linear in others if linear[1] != hidden]
    low = {name for name, columns, count in others if columns == hidden and count < columns and deep}
    if not low:  # what reads a divided stream and narrows it, as x_proj of Mamba, is divided by inputs, too
        rows |= {name for name, columns, count in deep if count < columns}
    result: dict[str, Split] = {}
    for name, _, _ in held:
        result[name] = "row" if name in rows else "whole" if name in low else "column"
    return result


def head_counts(config: Any) -> HeadCounts:
    """The heads of a model, 0 where it has none; where blocks differ, what divides all of their numbers."""
    text = config.get_text_config()
    layers = _layers(text)
    queries = _number(layers, "num_attention_heads")
    keys = _number(layers, "num_key_value_heads") or queries
    found = ((label, _number(layers, name)) for name, label in _LINEAR_ATTENTION.items())
    return HeadCounts(queries, keys, tuple((label, number) for label, number in found if number))


def _layers(config: Any) -> tuple[Any, ...]:
    """The config of each layer where they may differ: what differs cannot be read from the whole. Else the
    config alone."""
    return tuple(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else (config,)


def _number(layers: Iterable[Any], name: str) -> int:
    """What divides the field `name` of all `layers`; 0 where none has it."""
    values = [value for layer in layers if (value := getattr(layer, name, 0))]
    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else (value,))]
    return math.gcd(*(item for item in flat if isinstance(item, int)))
