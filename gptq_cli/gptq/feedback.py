"""Rows that make up for each other's errors: what a linear's outputs have to do with the model's loss.

GPTQ minimises tr(E H Eᵀ), E = W - Q: every row for itself. Where the errors of two outputs push the model's
predictions the same way, one can cancel the other. To second order the divergence of the predictions grows
with

    f = tr(A E H Eᵀ)      A = E[g gᵀ], g the gradient of the model's loss at the linear's output

(the Fisher matrix of the linear's weights, taken for A ⊗ H). With the block factorisation A = L D Lᵀ (L unit
lower triangular, blocks of a few rows) f is the sum over the blocks p of

    tr(D_p F_p H F_pᵀ)    F_p = E_p + Σ_{j > p} L_jpᵀ E_j

so that the blocks are solved from the last to the first, each for the goal G_p + Σ_{j > p} L_jpᵀ E_j: the
solver needs nothing new. It is what GPTQ does along columns, H = R Rᵀ. Rows of one block stay apart. The rows
with the largest A_nn come first, when all others can still make up for them.

A comes from few tokens, and is damped more than H. Of a wide linear it is known in panels of rows, as if
these had nothing to do with each other.

Source: YAQA (arXiv 2505.22988), section 3, whose rounding takes single rows and columns in turn; the blocks
let all rows of one, and those of the other linears of the stage, be solved side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from gptq_cli.gptq.grid import Solution
from gptq_cli.gptq.hessian import Hessian
from gptq_cli.gptq.matmul import fast_matmul
from gptq_cli.placement.schedule import panel_rows, part_rows

LONGEST = 2.0
"""A token's gradient is at most so long, in medians of its sample."""
DAMPING = 0.2
"""Added to A, times the mean of its diagonal."""
_RUN = 256
"""So many words of the vocabulary are summed before running sums are taken."""


def panels_of(rows: int) -> list[slice]:
    """The panels of `rows` rows."""
    size = panel_rows(rows)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def drawn_label_gradient(
    logits: Tensor,  # (tokens, V)
    generator: torch.Generator,  # on the CPU
) -> Tensor:  # (tokens, V), in their dtype
    """The gradient, with respect to the logits, of -log p of labels that are drawn from the model's own p:
    p, less 1 at the label. What it becomes at a linear's output is g; its expected square is the Fisher
    matrix, which the divergence grows with."""
    p = torch.softmax(logits.detach().float(), dim=-1)
    labels = _drawn(p, generator)
    return p.scatter_(1, labels, p.gather(1, labels) - 1).to(logits.dtype)


def _drawn(
    p: Tensor,  # (tokens, V), each row of them in proportion to its probabilities
    generator: torch.Generator,  # on the CPU
) -> Tensor:  # int64 (tokens, 1)
    """By the inverse of the distribution: one uniform number a token. First the run of `_RUN` words in which
    it falls, then the word in there: running sums are taken on the CPU, because a device's need not be the
    same from call to call.
    """
    rest = -p.shape[1] % _RUN
    runs = (torch.nn.functional.pad(p, (0, rest)) if rest else p).view(len(p), -1, _RUN)
    reached = runs.sum(-1).cpu().double().cumsum(-1)
    wanted = torch.rand(len(p), 1, generator=generator).double() * reached[:, -1:]
    run = torch.searchsorted(reached, wanted).clamp_(max=reached.shape[1] - 1)
    before = torch.where(run > 0, reached.gather(1, (run - 1).clamp(min=0)), 0.0)
    own = runs[torch.arange(len(p), device=p.device), run[:, 0].to(p.device)].cpu().double().cumsum(-1)
    word = torch.searchsorted(own, wanted - before).clamp_(max=_RUN - 1)
    return (run * _RUN + word).clamp_(max=p.shape[1] - 1).to(p.device)


class OutputMoment:
    """A = E[g gᵀ] of one linear, panel by panel."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._sums = [(own, Hessian(own.stop - own.start, device)) for own in panels_of(rows)]

    @property
    def panels(self) -> list[tuple[slice, Tensor]]:
        """Rows, and A of these (n, n); afterwards `add` raises."""
        return [(own, total.matrix()) for own, total in self._sums]

    def add(self, gradient: Tensor) -> None:
        """Add tokens: (samples, tokens, N) or (tokens, N). Cost: tokens · N · panel multiply-adds, or half.

        A few tokens (the first ones of a sample, labels that were hardly possible) have gradients many times
        as long as the others'. They would drown what the others say: longer ones are shortened.
        """
        g = gradient.detach()
        length = torch.linalg.vector_norm(g, dim=-1, keepdim=True, dtype=torch.float32)
        middle = length.sort(dim=-2).values[..., (length.shape[-2] - 1) // 2, None, :]  # as torch.median
        longest = torch.where(middle > 0, LONGEST * middle, torch.inf)
        part = (longest / length.clamp(min=torch.finfo(length.dtype).tiny)).clamp(max=1)
        rows = (g * part.to(g.dtype)).flatten(0, -2)
        for own, total in self._sums:
            total.add(rows[:, own])

    def finite(self) -> Tensor:
        """A bool on the device, False when NaN or infinity came in."""
        return torch.stack([total.finite() for _, total in self._sums]).all()


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some of the stacked rows of a stage, to be solved side by side, and what they make up for."""

    rows: Tensor
    """int64 (n,)."""
    before: Tensor
    """int64 (m,): rows that were solved before, whose errors these make up for."""
    share: Tensor
    """(m, n): by how much, L_jp."""


def _parts(rows: Tensor, A: Tensor, size: int) -> Iterator[Part]:
    """Parts of the rows `rows` (n,) with the matrix A (n, n), from the last of the factorisation on.

    Where A is all 0, as that of an output that nothing reads, no row makes up for another.
    """
    order = torch.argsort(A.diagonal(), stable=True)
    damped = A[order][:, order]
    damped.diagonal().add_(DAMPING * A.diagonal().mean())
    L, failed = torch.linalg.cholesky_ex(damped)
    del damped  # of every linear of the stage one matrix stays, until its parts are solved
    if failed:
        L = torch.eye(len(L), device=L.device)
    rows = rows[order]
    for start in reversed(range(0, len(rows), size)):
        stop = min(start + size, len(rows))
        share = torch.linalg.solve_triangular(
            L[start:stop, start:stop], L[stop:, start:stop], upper=False, left=False
        )
        yield Part(rows[start:stop], rows[stop:], share)


def _parts_of(rows: Tensor, moment: OutputMoment | None) -> Iterator[Part]:
    """Those of a linear, which has the stacked rows `rows`: all at once where nothing is known of it."""
    if moment is None:
        yield Part(rows, rows[:0], torch.zeros(0, len(rows), device=rows.device))
        return
    for own, A in moment.panels:
        yield from _parts(rows[own], A, part_rows(len(rows)))


def solve_in_parts(
    W: Tensor,  # (K, R) transposed goals: the stacked rows of a stage's linears
    outputs: Sequence[OutputMoment | None],  # of each linear
    lengths: Sequence[int],  # N of each
    solve: Callable[[Tensor], Solution],  # of rows (K, n); may change what it is given
) -> Solution:
    """The rows of a stage, solved part after part; side by side the parts that come next in each linear."""
    R = W.shape[1]
    E, whole = torch.zeros_like(W), None
    rows = torch.split(torch.arange(R, device=W.device), list(lengths))
    queues = [_parts_of(*pair) for pair in zip(rows, outputs, strict=True)]
    while parts := [part for queue in queues for part in islice(queue, 1)]:
        index = torch.cat([part.rows for part in parts])
        with fast_matmul():
            moved = torch.cat([E[:, part.before] @ part.share.to(E.dtype) for part in parts], dim=1)
        found = solve(W[:, index].add_(moved))
        if whole is None:
            like = (found.codes, found.scales, found.zeros)
            codes, scales, zeros = (X.new_empty(X.shape[0], R) for X in like)
            whole = replace(found, codes=codes, D=E, scales=scales, zeros=zeros)
        E[:, index] = found.D.sub_(moved)
        whole.codes[:, index], whole.scales[:, index] = found.codes, found.scales
        whole.zeros[:, index] = found.zeros
    assert whole is not None
    return whole
