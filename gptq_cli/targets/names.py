"""The names that readers give to linears: which ones they load as one matrix, and what that is called.

A server multiplies linears that share an input as one, under a name of its own: `qkv_proj` for `q_proj`,
`k_proj` and `v_proj`. It looks that name up in `dynamic`, and it wants one setting for all parts. What stands
before the decoder blocks changes, too (`model.language_model.layers` becomes `language_model.model.layers` or
`model.layers`); from the numbered blocks on, names stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import MappingProxyType

FUSED = MappingProxyType(
    {
        ("q_proj", "k_proj", "v_proj"): ("qkv_proj",),
        ("query", "key", "value"): ("qkv_proj", "qkv"),
        ("gate_proj", "up_proj"): ("gate_up_proj",),
        ("w1", "w3"): ("gate_up_proj", "w13"),
        ("in_proj_qkv", "in_proj_z"): ("in_proj_qkvz",),
        ("in_proj_b", "in_proj_a"): ("in_proj_ba",),
        ("q_a_proj", "kv_a_proj_with_mqa"): ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),
    }
)
"""Parts, in the order of the matrix -> what vLLM 0.33 and SGLang 0.5.23 call the matrix."""
_OPTIMUM_BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")
"""Where Optimum 2.3 looks for blocks, in this order, if the config does not say `block_name_to_quantize`."""


def finds_blocks(prefix: str, modules: Iterable[str]) -> bool:
    """Whether Optimum finds the blocks `prefix` of a model alone: it takes the first that any name has."""
    names = tuple(modules)
    found = (known for known in _OPTIMUM_BLOCKS if any(known in name for name in names))
    return next(found, "") == prefix


def fused_names(leaves: Collection[str], present: Collection[str]) -> tuple[str, ...]:
    """What readers call the matrices whose parts are all among `leaves`.

    `present`: all parts that the module has, in whatever setting. A part may be alone: layers that share the
    keys and values of another have a `q_proj` only, and it is their `qkv_proj`.
    """
    found: dict[str, None] = {}
    for parts, names in FUSED.items():
        there = [part for part in parts if part in present]
        if there and all(part in leaves for part in there):
            found |= dict.fromkeys(names)
    return tuple(name for name in found if name not in present)
