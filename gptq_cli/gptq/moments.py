"""The statistics of one stage over the calibration samples, and the goal that follows from them.

Without a dense stream this is the Hessian alone. With one, each sample has two inputs, the quantized model's
(x) and the dense model's (x_dense), and the linears should produce the *dense* model's output: see goal.py. A
sample without a dense copy counts for the Hessian only. The length of the step, α, and its damping, λ, are
not settings to be tuned: a step is made from the first three quarters of the paired samples (H from all that
are not held out), and the last quarter decides which α and λ give the smallest loss. The final step uses
these and all samples. With fewer than four pairs there is nothing to decide on, and α is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from gptq_cli.gptq.choice import OWN_FACTORS, Factors, StepChoice, choose_step
from gptq_cli.gptq.first_token import add_tokens
from gptq_cli.gptq.gain import Gain, outputs_of
from gptq_cli.gptq.goal import Part, bounded_step, full_step
from gptq_cli.gptq.hessian import CrossMoment, Hessian
from gptq_cli.gptq.matmul import exact_matmul

HELD_OUT_SHARE = 4
"""One pair in so many is held out: the last ones, from another part of the text."""
ROWS_ASKED = 256
"""About this many rows decide on α and λ, every n-th of the stage: rows agree, and each costs 3·K² per λ."""


class StageMoments:
    """Hessian of a stage, and with `dense` the cross moments for its goal; freed on leaving `with`.

    `samples`: how many will have a dense copy. `weight` (N, K), dense: given where errors of the output are
    collected, the B of goal.py, and not those of the input, its D: where the output is added to a residual,
    whose error the goal then corrects as well (`add` takes it as `gap`), or where there are few rows. `gain`:
    what happens to the output before; tokens count for what it leaves of them. `one_start`: first_token.py.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device,
        *,
        samples: int,
        dense: bool,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        gain: Gain | None = None,
        one_start: bool = False,
    ) -> None:
        self._weight, self._bias, self._gain, self._one_start = weight, bias, gain, one_start
        self._fit_samples, self._device = samples - samples // HELD_OUT_SHARE, device
        self._stack = ExitStack()
        self._fit = self._stack.enter_context(Hessian(in_features, device))
        self._held: Hessian | None = None
        self._fit_error: CrossMoment | None = None
        self._held_error: CrossMoment | None = None
        if dense:
            self._held = self._stack.enter_context(Hessian(in_features, device))
            rows = None if weight is None else weight.shape[0]
            self._fit_error = self._stack.enter_context(CrossMoment(in_features, device, rows=rows))
            self._held_error = self._stack.enter_context(CrossMoment(in_features, device, rows=rows))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()

    def free(self) -> None:
        """Give the memory back; the tensors that `hessian` and `goal` returned stay valid."""
        self._stack.close()

    @property
    def tokens(self) -> int:
        """Tokens seen in all."""
        return self._fit.tokens + (self._held.tokens if self._held else 0)

    @property
    def parts(self) -> tuple[Hessian | CrossMoment, ...]:
        """The sums that it is made of."""
        parts = (self._fit, self._held, self._fit_error, self._held_error)
        return tuple(part for part in parts if part is not None)

    def finite(self) -> Tensor:
        """A bool on the device, False when NaN or infinity came in, in either stream."""
        return torch.stack([part.finite() for part in self.parts]).all()

    def add(
        self,
        x: Tensor,  # (batch, seq_len, K); (tokens, K) where the model routes tokens, then without `dense`
        dense: Tensor | None,  # the dense stream's input; None: these samples have none
        first_sample: int,  # index of x[0] among the paired samples; ignored without `dense`
        gap: Tensor | None = None,  # (batch, seq_len, N) residual of the dense stream, less that of x
    ) -> None:
        """Add a micro-batch."""
        if self._gain is not None and len(x) > 1:  # outputs are widened to float32: one sample's at a time
            for i in range(len(x)):
                one = slice(i, i + 1)
                self.add(x[one], _part(dense, one), first_sample + i, _part(gap, one))
            return
        if dense is None or self._held is None or self._fit_error is None or self._held_error is None:
            add_tokens(self._scaled(x)[0], self._fit, one_start=self._one_start)
            return
        cut = min(max(self._fit_samples - first_sample, 0), x.shape[0])
        for part, hessian, cross in (
            (slice(cut), self._fit, self._fit_error),
            (slice(cut, None), self._held, self._held_error),
        ):
            if len(x[part]):
                inputs, error = self._error(x[part], dense[part], _part(gap, part))
                add_tokens(inputs, hessian, error, cross, one_start=self._one_start)

    def _error(
        self, x: Tensor, dense: Tensor, gap: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # x̃, and what W x̃ lacks; without a residual, what x̃ itself lacks
        if self._weight is None:
            return x, dense - x
        if self._gain is None:
            error = outputs_of(dense - x, self._weight)
            return x, error if gap is None else error.add_(gap.view_as(error))
        inputs, outputs = self._scaled(x)
        error = self._scaled(dense)[1].sub_(outputs)
        if gap is not None:
            error.add_(gap.view_as(error).float() * self._gain.inverse)
        return inputs, error.to(x.dtype)

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:  # x̃ = s·x in x's dtype, s·y in float32
        if self._weight is None or self._gain is None:
            return x, x
        y = outputs_of(x, self._weight).float()
        if self._bias is not None:
            y += self._bias
        s = self._gain.of_tokens(y)
        return (x * s).to(x.dtype), y.mul_(s)

    def hessian(self) -> Tensor:  # (K, K)
        """H over every token; zeros where there was none."""
        if self.tokens == 0:
            return torch.zeros(self._fit.in_features, self._fit.in_features, device=self._device)
        if self._held is None or self._held.tokens == 0:
            return self._fit.matrix()
        return torch.lerp(self._held.matrix(), self._fit.matrix(), self._fit.tokens / self.tokens)

    def goal(
        self,
        weights: Sequence[Tensor],  # (N_i, K)
        H: Tensor,  # (K, K), from `hessian`
        damp_percent: float,
        *,
        part: Part | None = None,
        factors: Factors = OWN_FACTORS,
    ) -> tuple[list[Tensor] | None, StepChoice]:
        """(the weights to approximate, the step's α and λ); None where the samples support no correction.

        Several processes have a `part` of the rows each, and share the work on `factors`. Call it once: it
        consumes the moments.
        """
        held, fit_error, held_error = self._held, self._fit_error, self._held_error
        if held is None or not (fit_error and fit_error.tokens and held_error and held_error.tokens):
            return None, StepChoice()
        W = torch.cat([weight.to(H.dtype) for weight in weights])
        M_fit, M_held = fit_error.matrix(), held_error.matrix()
        asked = slice(None, None, max(1, W.shape[0] // ROWS_ASKED))
        B_fit, B_held = self._wanted(W, M_fit, asked), self._wanted(W, M_held, asked)
        if self._gain is not None:  # rows count for what the residual gets of them
            gamma = self._gain.gamma.to(B_fit.device)[asked, None]
            B_fit, B_held = B_fit * gamma, B_held * gamma
        choice = choose_step(B_fit, self._fit.matrix(), B_held, held.matrix(), damp_percent, factors)
        self._fit.free()
        held.free()
        if choice.alpha == 0.0:
            return None, choice
        M = M_held.lerp_(M_fit, fit_error.tokens / (fit_error.tokens + held_error.tokens))
        part = part or Part(slice(None), tuple(weight.shape[0] for weight in weights))
        factor = factors.for_step(H, choice.damp_percent)
        step = full_step(self._wanted(W, M, part.rows), factor)
        if step is None:
            return None, StepChoice()
        W = W[part.rows]
        moved, bounded = bounded_step(step.mul_(choice.alpha), W)
        goals = list(torch.split(W.add_(step), list(part.lengths)))
        return goals, StepChoice(choice.alpha, factor.damp_percent, moved, bounded)

    def _wanted(self, W: Tensor, M: Tensor, rows: slice) -> Tensor:  # B (rows, K)
        """The B of the step: M is B itself, or the D in W D."""
        if self._weight is not None:
            return M[rows]
        with exact_matmul():
            return W[rows] @ M


def _part(x: Tensor | None, samples: slice) -> Tensor | None:
    return None if x is None else x[samples]
