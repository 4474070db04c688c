"""Solved linears on their way between ranks: codes as uint8, scales as fp16, and the account in fp64.

    account  6 float64 for each linear      g_idx   int32 (K)       scales  fp16 (N, groups)
    zeros    uint8 (N, groups)              codes   uint8 (N, K)

One flat tensor of bytes for all linears of a rank, the widest numbers first, so that each lies where its
dtype allows. How many bytes that is follows from the shapes, which every rank knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.gptq.quantized import QuantizedLinear

_ACCOUNT = 6


@dataclass(frozen=True, slots=True)
class Shape:
    """Of some rows of a linear, solved."""

    rows: int
    columns: int
    groups: int


@dataclass(frozen=True, slots=True)
class _Section:
    """One tensor of each linear, all of them side by side."""

    dtype: torch.dtype
    shape: Callable[[Shape], tuple[int, ...]]
    of: Callable[[QuantizedLinear], Tensor]


def _account(linear: QuantizedLinear) -> Tensor:
    return torch.tensor(
        [
            linear.loss,
            linear.rtn_loss,
            linear.energy,
            linear.damp_percent,
            linear.attempts,
            linear.method == "gptq",
        ],
        dtype=torch.float64,
        device=linear.codes.device,
    )


_SECTIONS = (
    _Section(torch.float64, lambda s: (_ACCOUNT,), _account),
    _Section(torch.int32, lambda s: (s.columns,), lambda q: q.g_idx),
    _Section(torch.float16, lambda s: (s.rows, s.groups), lambda q: q.scales),
    _Section(torch.uint8, lambda s: (s.rows, s.groups), lambda q: q.zeros),
    _Section(torch.uint8, lambda s: (s.rows, s.columns), lambda q: q.codes),
)


def wire_bytes(shapes: Sequence[Shape]) -> int:
    """Bytes of linears of these shapes."""
    return sum(
        torch.Size(one.shape(shape)).numel() * one.dtype.itemsize for one in _SECTIONS for shape in shapes
    )


def to_bytes(linears: Sequence[QuantizedLinear], device: torch.device) -> Tensor:
    """The linears as one flat uint8 tensor."""
    parts = [
        one.of(linear).contiguous().flatten().view(torch.uint8) for one in _SECTIONS for linear in linears
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)


def from_bytes(flat: Tensor, shapes: Sequence[Shape]) -> list[QuantizedLinear]:
    """The linears of these shapes that `to_bytes` made `flat` of; the tensors are views of it."""
    found: list[list[Tensor]] = [[] for _ in shapes]
    start = 0
    for section in _SECTIONS:
        for parts, shape in zip(found, shapes, strict=True):
            size = section.shape(shape)
            end = start + torch.Size(size).numel() * section.dtype.itemsize
            parts.append(flat[start:end].view(section.dtype).view(size))
            start = end
    return [_linear(*parts) for parts in found]


def _linear(account: Tensor, g_idx: Tensor, scales: Tensor, zeros: Tensor, codes: Tensor) -> QuantizedLinear:
    loss, rtn_loss, energy, damp_percent, attempts, gptq = account.tolist()
    return QuantizedLinear(
        codes=codes,
        scales=scales,
        zeros=zeros,
        g_idx=g_idx,
        loss=loss,
        rtn_loss=rtn_loss,
        damp_percent=damp_percent,
        attempts=int(attempts),
        method="gptq" if gptq else "rtn",
        energy=energy,
    )


def joined(pieces: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """One linear from its rows in pieces, in order."""
    if len(pieces) == 1:
        return pieces[0]
    energy = sum(piece.energy for piece in pieces)

    def mean(losses: Sequence[float]) -> float:
        if not energy:
            return max(losses)
        return (
            sum(loss * piece.energy for loss, piece in zip(losses, pieces, strict=True) if piece.energy)
            / energy
        )

    first = pieces[0]
    return QuantizedLinear(
        codes=torch.cat([piece.codes for piece in pieces]),
        scales=torch.cat([piece.scales for piece in pieces]),
        zeros=torch.cat([piece.zeros for piece in pieces]),
        g_idx=first.g_idx,
        loss=mean([piece.loss for piece in pieces]),
        rtn_loss=mean([piece.rtn_loss for piece in pieces]),
        damp_percent=first.damp_percent,
        attempts=first.attempts,
        method="rtn" if any(piece.method == "rtn" for piece in pieces) else "gptq",
        energy=energy,
    )
