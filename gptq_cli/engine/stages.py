"""Which linears of a block read the same input.

Linears with one input share one Hessian, one factorisation and one solve: q, k and v of an attention,
gate and up of an MLP, or, in a block that runs both side by side, all five. No table of architectures
knows this; one sample run through the block does. Each linear notes the tensor it reads, and those
that read the *same tensor* form a stage, in order of first use.

A linear that runs more than once per forward, not at all for the traced sample, or on some of its tokens (an
expert, to which tokens are routed) has no single moment at which its input is complete. Its stage is marked
`once=False`, and its Hessian is collected over whole forwards. So is that of linears whose names differ from
its name in a number only: an expert that got all tokens of the sample is an expert all the same. Such linears
share a stage if their names have the same numbers (gate and up of one expert) and they read the same tensor
each time. Experts are alike: what holds for those that the sample reached holds for the others, and
where it does not hold for one of them, each linear is a stage of its own.

Such stages are worked on in *expert batches*: those of one *family* (names alike but for numbers, the same
number of columns) are collected side by side, as many as the schedule allows. Experts see few tokens each,
and together they say what the block's tokens are like: see `engine.experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.engine.calls import BlockCall
from gptq_cli.model.reads import Read
from gptq_cli.placement.names import fold, numbers


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
    follow in expert batches, family after family.
    """
    once = [stage for stage in stages if stage.once]
    passes = [[stage] for stage in once] if true_sequential else [once]
    families: dict[tuple[str, int], list[Stage]] = {}
    for stage in stages:
        if not stage.once:
            families.setdefault((fold(stage.leader), columns[stage.leader]), []).append(stage)
    for (_, width), family in families.items():
        size = experts_per_batch(width)
        passes += [family[start : start + size] for start in range(0, len(family), size)]
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
    for name in order:
        if fold(name) in multi_call:
            continue
        for group in shared:
            if reads[group[0]][0].same(reads[name][0]):
                group.append(name)
                break
        else:
            shared.append([name])
    reached = [name for name in order if fold(name) in multi_call]
    routed = _routed(reached, [name for name in linears if name not in order], reads)
    once = (Stage(tuple(group), batch_dim=_batch_dim(reads[group[0]][0].tensor, tokens)) for group in shared)
    return (
        *once,
        *(Stage(tuple(group), once=False) for group in routed),
    )


def _routed(
    reached: Sequence[str], unreached: Sequence[str], reads: Mapping[str, Sequence[Read]]
) -> list[list[str]]:
    """The stages of linears that do not run once, those that the sample reached first."""
    found: dict[tuple[str, ...], list[list[str]]] = {}
    for name in reached:
        known = found.setdefault(numbers(name), [])
        for group in known:
            if _same(reads[group[0]], reads[name]):
                group.append(name)
                break
        else:
            known.append([name])
    groups = [group for known in found.values() for group in known]
    patterns: dict[str, set[tuple[str, ...]]] = {}
    for group in groups:
        for name in group:
            patterns.setdefault(fold(name), set()).add(tuple(fold(member) for member in group))
    shares = {kind: next(iter(seen)) for kind, seen in patterns.items() if len(seen) == 1}
    stages: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for name in (*reached, *unreached):
        pattern = shares.get(fold(name), ())
        if any(shares.get(kind) != pattern for kind in pattern):
            pattern = ()
        stages.setdefault((numbers(name), pattern or (name,)), []).append(name)
    return [
        sorted(group, key=lambda name: pattern.index(fold(name))) if len(group) > 1 else group
        for (_, pattern), group in stages.items()
    ]


def _same(a: Sequence[Read], b: Sequence[Read]) -> bool:
    return len(a) == len(b) and all(x.same(y) for x, y in zip(a, b, strict=True))


def _sees_all(x: Tensor, tokens: int) -> bool:
    """Whether an input has every token, once or in several copies (streams of hidden states) side by side."""
    return x.numel() // x.shape[-1] == tokens or _batch_dim(x, tokens) > 0


def _batch_dim(x: Tensor, tokens: int) -> int:
    """The dimension of one sample before that of its tokens; 0 also where both are flattened."""
    shape = tuple(x.shape[:-1])
    return next((at for at in range(len(shape) - 1) if shape[at : at + 2] == (1, tokens)), 0)
