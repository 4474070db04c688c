"""Which linears of a block read the same input.

Linears with one input share one Hessian, one factorisation and one solve: q, k and v of an attention,
gate and up of an MLP, or, in a block that runs both side by side, all five. No table of architectures
knows this; one sample run through the block does. Each linear notes the tensor it reads, and those
that read the *same tensor* form a stage, in order of first use.

A linear that runs more than once per forward, not at all for the traced sample, or on some of its tokens (an
expert, to which tokens are routed) has no single moment at which its input is complete. It forms a stage of
its own, marked `once=False`, whose Hessian is collected over whole forwards. So do linears whose names differ
from its name in a number only: an expert that got all tokens of the sample is an expert all the same.

Such stages are worked on in *expert batches*: those that read the same number of columns are collected side
by side, as many as the schedule allows. Experts see few tokens each, and together they say
what the block's tokens are like: see `gptq.moments.shrink_to_pooled`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.engine.calls import BlockCall
from gptq_cli.model.reads import Read
from gptq_cli.placement.names import fold


@dataclass(frozen=True, slots=True)
class Stage:
    """Linears (names relative to the block) that read the same input, in order of use."""

    linears: tuple[str, ...]
    once: bool = True
    """Each linear runs exactly once per forward."""
    batch_dim: int = 0
    """Which dimension of the input tells the samples of a micro-batch apart."""

    @property
    def leader(self) -> str:
        """The linear whose pre-hook sees the input first."""
        return self.linears[0]


def collection_passes(
    stages: Sequence[Stage],
    columns: Mapping[str, int],  # K of each linear
    *,
    true_sequential: bool,
    experts_per_batch: Callable[[int], int],  # K -> how many fit, at least one
) -> list[list[Stage]]:
    """The stages that are collected side by side, pass after pass.

    Each stage that runs once has a pass of its own, or with `true_sequential` off they share one. The others
    follow in expert batches of one K each.
    """
    once = [stage for stage in stages if stage.once]
    passes = [[stage] for stage in once] if true_sequential else [once]
    by_columns: dict[int, list[Stage]] = {}
    for stage in stages:
        if not stage.once:
            by_columns.setdefault(columns[stage.leader], []).append(stage)
    for width, multi_call in by_columns.items():
        size = experts_per_batch(width)
        passes += [multi_call[start : start + size] for start in range(0, len(multi_call), size)]
    return [collected for collected in passes if collected]


def find_stages(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    call: BlockCall,
    hidden: Tensor,  # of one sample: most often (1, seq_len, hidden_size)
    tokens: int | None = None,
) -> tuple[Stage, ...]:
    """The stages of `block`, in the order in which one forward of one sample of `tokens` tokens (None: as
    many as `hidden` has rows) reaches them."""
    reads: dict[str, list[Read]] = {name: [] for name in linears}
    order: list[str] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            reads[name].append(Read.of(args[0]))
            if name not in order:
                order.append(name)

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in linears.items()]
    try:
        with torch.no_grad():
            call.rehearse(block, hidden)
    finally:
        for handle in handles:
            handle.remove()

    tokens = hidden.numel() // hidden.shape[-1] if tokens is None else tokens
    multi_call = {
        fold(name) for name, seen in reads.items() if len(seen) != 1 or not _sees_all(seen[0].tensor, tokens)
    }
    shared: list[list[str]] = []
    alone: list[str] = []
    for name in order:
        if fold(name) in multi_call:
            alone.append(name)
            continue
        for group in shared:
            if reads[group[0]][0].same(reads[name][0]):
                group.append(name)
                break
        else:
            shared.append([name])
    alone += [name for name in linears if name not in order]
    once = (Stage(tuple(group), batch_dim=_batch_dim(reads[group[0]][0].tensor, tokens)) for group in shared)
    return (*once, *(Stage((name,), once=False) for name in alone))


def _sees_all(x: Tensor, tokens: int) -> bool:
    """Whether an input has every token, once or in several copies (streams of hidden states) side by side."""
    return x.numel() // x.shape[-1] == tokens or _batch_dim(x, tokens) > 0


def _batch_dim(x: Tensor, tokens: int) -> int:
    """The dimension of one sample before that of its tokens; 0 also where both are flattened."""
    shape = tuple(x.shape[:-1])
    return next((at for at in range(len(shape) - 1) if shape[at : at + 2] == (1, tokens)), 0)
