"""The token that every sample begins with counts for many.

A tokenizer that begins each text with a token of its own, and a chat template, give all samples the same
first token. Later tokens attend to it more than to any other (the attention sink), so its keys and values
are in every output of the attention, with an error that is the same everywhere and does not average out. In
H = E[x xᵀ] it is one token of seq_len, and what W - Q makes of it is left to chance. Its input x₀ is nearly
the same vector in every sample: to keep (W - Q) x₀ small costs one direction of K. So each sample adds
s² x₀ x₀ᵀ to the sums, and what its output lacks in proportion, with

    s² + 1 = min(Σ ‖x_t‖² / ‖x₀‖², seq_len - 1) / 4      t > 0, at least 1

which makes it count as a quarter of the sample's other tokens do, in number or in energy, whichever is less:
where ‖x₀‖ is large already (massive activations), H is as it was, and with it the damping. Experts, to which
tokens are routed, are left out.

Where samples begin with different tokens this does not hold, and nothing is added. (Weights that follow the
gradient, largest for the first tokens, made such text worse: docs/quality.md, "Tried and left out".)

Source for the sink: StreamingLLM (arXiv 2309.17453), section 3.1; massive activations: arXiv 2402.17762. The
weight is our own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_cli.gptq.hessian import CrossMoment, Hessian

SHARE = 0.25
"""Of the other tokens of the sample."""


def shared_start(input_ids: Tensor) -> bool:  # int64 (samples, seq_len)
    """Whether several samples all begin with the same token."""
    return len(input_ids) > 1 and bool((input_ids[:, 0] == input_ids[0, 0]).all())


def add_tokens(
    x: Tensor,  # (..., K); with `one_start` (samples, seq_len, K)
    hessian: Hessian,
    error: Tensor | None = None,  # (..., N) of the same tokens
    cross: CrossMoment | None = None,
    *,
    one_start: bool,
) -> None:
    """Add tokens to H, and to the cross moment where there is one; with `one_start` the first ones of the
    samples once more, by what they count for beyond one token."""
    hessian.add(x)
    if error is not None and cross is not None:
        cross.add(error, x)
    if not one_start:
        return
    s = emphasis(x, error)
    first = (x[:, 0] * s).to(x.dtype)
    hessian.add(first, counted=False)
    if error is not None and cross is not None:
        cross.add((error[:, 0] * s).to(error.dtype), first, counted=False)


def emphasis(
    x: Tensor,  # (samples, seq_len, K)
    error: Tensor | None = None,  # (samples, seq_len, N)
) -> Tensor:  # (samples, 1), float32
    """s of each sample; no larger than the dtypes of s·x₀ and of s·e₀ can hold."""
    own = x[:, 0].float().square().sum(-1)
    # one sample at a time: a CPU widens what it sums
    others = torch.stack([torch.linalg.vector_norm(one, dtype=torch.float32) for one in x[:, 1:]]).square()
    weight = SHARE * (others / own).clamp(max=x.shape[1] - 1)
    s = torch.minimum((weight - 1).clamp(min=0).sqrt(), _room(x))
    if error is not None:
        s = torch.minimum(s, _room(error))
    return torch.where(own > 0, s, 0.0)[:, None]


def _room(x: Tensor) -> Tensor:  # (samples, seq_len, K) -> (samples,)
    """What the first tokens can be multiplied with."""
    return torch.finfo(x.dtype).max / 2 / x[:, 0].float().abs().amax(-1)
