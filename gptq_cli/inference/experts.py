"""Experts made of packed linears, in place of Transformers' fused 3-D tensors.

Transformers 5 keeps the experts of a layer in two tensors, `gate_up_proj` (E, 2 I, H) and `down_proj`
(E, H, I); a GPTQ checkpoint has three packed linears per expert. `PackedExperts` is called like the fused
module and computes one expert after another on the tokens routed to it. The activation between the linears is
the fused module's own `_apply_gate`, so that its variants keep working.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.errors import CheckpointError

_NEEDED = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


def check_servable(name: str, fused: nn.Module) -> None:
    """Raise `CheckpointError` when `PackedExperts` cannot replace the experts module `name`."""
    for field, needed in _NEEDED.items():
        found = getattr(fused, field, needed)
        if found != needed or not hasattr(fused, "_apply_gate"):
            raise CheckpointError(
                f"{name} ({type(fused).__name__}) holds quantized experts with {field} = {found}; "
                f"allowed: {field} = {needed}",
                hint="vLLM and GPTQModel read more kinds of quantized experts",
            )


class PackedExperts(nn.Module):
    """Experts of packed linears: `gate`, `up` and `down` hold one module per expert."""

    def __init__(
        self,
        fused: nn.Module,
        gate: Sequence[nn.Module],
        up: Sequence[nn.Module],
        down: Sequence[nn.Module],
    ) -> None:
        """`fused`: the module replaced; its activation is used, its parameters are removed."""
        super().__init__()
        for name in [name for name, _ in fused.named_parameters(recurse=False)]:
            delattr(fused, name)
        fused._is_hf_initialized = True  # type: ignore[assignment]  # Transformers has nothing to fill in here
        self.fused = fused
        self.gate, self.up, self.down = nn.ModuleList(gate), nn.ModuleList(up), nn.ModuleList(down)

    def forward(
        self,
        hidden_states: Tensor,  # (tokens, H)
        top_k_index: Tensor,  # (tokens, k)
        top_k_weights: Tensor,  # (tokens, k)
    ) -> Tensor:  # (tokens, H)
        result = torch.zeros_like(hidden_states)
        fused: Any = self.fused
        for expert in torch.unique(top_k_index).tolist():
            if not 0 <= expert < len(self.gate):
                continue
            token, slot = torch.where(top_k_index == expert)
            x = hidden_states[token]
            inner = fused._apply_gate(torch.cat([self.gate[expert](x), self.up[expert](x)], -1))
            out = self.down[expert](inner) * top_k_weights[token, slot, None]
            result.index_add_(0, token, out.to(result.dtype))
        return result


def by_role(name: str, found: Mapping[tuple[str, int], nn.Module]) -> dict[str, list[nn.Module]]:
    """The modules of each role in the order of the experts, from (role, expert) -> module.

    Raises `CheckpointError` for an expert that lacks a role.
    """
    count = 1 + max(expert for _, expert in found)
    result: dict[str, list[nn.Module]] = {}
    for role in ("gate", "up", "down"):
        missing = [expert for expert in range(count) if (role, expert) not in found]
        if missing:
            raise CheckpointError(
                f"{name}: expert {missing[0]} has no quantized {role} projection, though others have",
                hint="GPTQModel reads partly quantized experts",
            )
        result[role] = [found[role, expert] for expert in range(count)]
    return result
