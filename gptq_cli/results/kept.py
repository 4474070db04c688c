"""Linears that stay dense and why, and linears with settings of their own: one line per pattern of names."""

from __future__ import annotations

from dataclasses import dataclass

BY_MODULE = "its settings say dense"
GATES = "its output only gates"
TOO_SMALL = "too small to be packed"
IN_PART = "another part of its tensor of experts stays dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptDense:
    """Linears of the blocks that keep their weights, folded over the blocks that they are in."""

    name: str
    """`model.layers.*.linear_attn.in_proj_a`; of some blocks `model.layers.0,2-3.mlp.down_proj`."""
    reason: str
    linears: int
    weights: int
    """Of all of them together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnSettings:
    """Linears whose settings differ from those of the rest, folded over the blocks."""

    name: str
    """`model.layers.*.mlp.down_proj`, `lm_head`; of some blocks `model.layers.0,2-3.mlp.down_proj`."""
    bits: int
    group_size: int
    sym: bool
    linears: int
