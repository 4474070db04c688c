"""Which linears of a block read the same input.

Linears with one input share one Hessian, one factorisation and one solve: q, k and v of an attention,
gate and up of an MLP, or, in a block that runs both side by side, all five. No table of architectures
knows this; one sample run through the block does. Each linear notes the tensor it reads, and those
that read the *same tensor* form a stage, in order of first use.

A linear that runs more than once a forward, or not at all for the traced sample (an expert that no
token chose), has no single moment at which its input is complete. It forms a stage of its own, marked
`once=False`, whose Hessian is collected over whole forwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.engine.capture import BlockCall


@dataclass(frozen=True, slots=True)
class Stage:
    """Linears (names relative to the block) that read the same input, in order of use."""

    linears: tuple[str, ...]
    once: bool = True
    """Each linear runs exactly once a forward."""

    @property
    def leader(self) -> str:
        """The linear whose pre-hook sees the input first."""
        return self.linears[0]


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """True when `a` and `b` are one tensor, or views of the same elements in the same order."""
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.device == b.device
    )


def find_stages(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    call: BlockCall,
    hidden: Tensor,  # (1, seq_len, hidden_size)
) -> tuple[Stage, ...]:
    """The stages of `block`, in the order in which one forward of one sample reaches them."""
    reads: dict[str, list[Tensor]] = {name: [] for name in linears}
    order: list[str] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            reads[name].append(args[0])  # holding the tensor keeps its address from being used again
            if name not in order:
                order.append(name)

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in linears.items()]
    try:
        with torch.no_grad():
            call(block, hidden)
    finally:
        for handle in handles:
            handle.remove()

    shared: list[list[str]] = []
    alone: list[str] = []
    for name in order:
        if len(reads[name]) != 1:
            alone.append(name)
            continue
        for group in shared:
            if same_tensor(reads[group[0]][0], reads[name][0]):
                group.append(name)
                break
        else:
            shared.append([name])
    alone += [name for name in linears if name not in order]
    return (*(Stage(tuple(group)) for group in shared), *(Stage((name,), once=False) for name in alone))
