"""16-bit models on a processor without 16-bit matmul instructions.

Without AVX512_BF16 or AMX a CPU multiplies bf16 matrices at a tenth of its fp32 speed, and a model in that
dtype is very slow. Running the model in fp32 would double the memory of weights and activations and change
the operations between the matmuls. `Fp32Matmul` changes the matmuls: operands are widened to fp32,
multiplied, and the result is rounded once to the dtype it would have had. Processors with 16-bit instructions
compute the same (exact products, fp32 sums, one rounding), so a model's outputs agree on both, up to the
order of summation.

Attention (scaled_dot_product_attention) widens for itself, but on such a processor its kernels take five to
twelve times as long as in fp32 to go forward and back, and in float16 about twice as long forward. There it
is computed in fp32 too (`scripts/bench_matmul.py`).

    with matmul_scope(hidden.dtype, hidden.device):
        block(hidden)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gptq_cli.gptq.matmul import fast_matmul_supported

_HALVES = (torch.bfloat16, torch.float16)
_MIN_ROWS = 32
"""With fewer rows the time goes into reading the other factor, which is faster in 16 bits."""
_ROWS_AT_ONCE, _WEIGHTS_AT_ONCE = 512, 1 << 20
"""What is widened at a time: rows of x; numbers of a weight (4 MiB in fp32), but as many rows at least."""
_LEFT: dict[Any, int] = {
    functional.linear: 0,
    torch.addmm: 1,
    torch.baddbmm: 1,
    torch.bmm: 0,
    torch.einsum: 0,
    torch.matmul: 0,
    torch.mm: 0,
    Tensor.__matmul__: 0,
    Tensor.addmm: 1,
    Tensor.baddbmm: 1,
    Tensor.bmm: 0,
    Tensor.matmul: 0,
    Tensor.mm: 0,
}
"""The matmul functions -> the position of the left factor among their tensors."""


class Fp32Matmul(TorchFunctionMode):
    """Inside `with`, in this thread, matmuls of 16-bit CPU tensors are computed in fp32 and rounded, and so
    is attention that is in float16 or that a gradient will go back through."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called by torch for every function; only matmuls and attention are changed."""
        kwargs = kwargs or {}
        if func in _LEFT and "out" not in kwargs:
            operands = list(_tensors((*args, *kwargs.values())))
            if _worth_widening(operands, _LEFT[func]):
                if func is functional.linear and not kwargs and _plain(*args):
                    return _linear(*args)
                return _in_fp32(func, args, kwargs, operands[0].dtype)
        elif func is functional.scaled_dot_product_attention:
            operands = list(_tensors((*args, *kwargs.values())))[:3]  # queries, keys, values
            if _worth_widening(operands, 0) and (operands[0].dtype == torch.float16 or _goes_back(operands)):
                return _in_fp32(func, args, kwargs, operands[0].dtype)
        return func(*args, **kwargs)


def _in_fp32(
    func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> Tensor:
    return func(*_widened(args), **{name: _widened(value) for name, value in kwargs.items()}).to(dtype)


def _goes_back(operands: Iterable[Tensor]) -> bool:
    """Whether a gradient is wanted."""
    return torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)


def _worth_widening(operands: list[Tensor], left: int) -> bool:
    """True for at least `_MIN_ROWS` rows, all of one 16-bit dtype and on the CPU."""
    if len({(operand.dtype, operand.device.type) for operand in operands}) != 1 or left >= len(operands):
        return False
    factor = operands[left]
    tall = factor.ndim > 1 and factor.numel() >= _MIN_ROWS * factor.shape[-1]
    return tall and factor.dtype in _HALVES and factor.device.type == "cpu"


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a linear has the usual shapes: its weight is no vector, no bias is spread over its outputs."""
    return weight.ndim == 2 and x.shape[-1] > 0 and (bias is None or bias.shape == weight.shape[:1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, given = x.reshape(-1, x.shape[-1]), [x, weight] if bias is None else [x, weight, bias]
    linear = _Linear.apply if _goes_back(given) else _linear_rows
    out: Tensor = linear(rows, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (tokens, K), (N, K), (N,)
    """A part of each at a time, so that what is widened stays in the cache and reuses the same memory: a head
    of 262,144 words is not widened as a whole for a few tokens."""
    out = x.new_empty(len(x), len(weight))
    for own in _rows_of(weight):
        wide, wide_bias = weight[own].float(), None if bias is None else bias[own].float()
        for part in _pieces(len(x), _ROWS_AT_ONCE):
            out[part, own] = functional.linear(x[part].float(), wide, wide_bias)
    return out


class _Linear(torch.autograd.Function):
    """The same with gradients. What it keeps for them is as it came, in 16 bits. `torch.func.grad` and `jvp`
    cannot go through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.pieces = list(_rows_of(weight))
        return _linear_rows(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *towards: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of x, of the weight and of the bias, summed in fp32 and rounded once."""
        (out,), (x, weight) = towards, ctx.saved_tensors
        to_x = to_weight = to_bias = None
        if weight is not None:
            to_x = out.new_zeros(len(out), weight.shape[1], dtype=torch.float32)
            for own in ctx.pieces:
                wide = weight[own].float()
                for part in _pieces(len(out), _ROWS_AT_ONCE):
                    to_x[part].addmm_(out[part, own].float(), wide)
            to_x = to_x.to(out.dtype)
        if x is not None:
            to_weight = out.new_empty(out.shape[1], x.shape[1])
            for own in ctx.pieces:
                total = x.new_zeros(len(to_weight[own]), x.shape[1], dtype=torch.float32)
                for part in _pieces(len(out), _ROWS_AT_ONCE):
                    total.addmm_(out[part, own].float().T, x[part].float())
                to_weight[own] = total
        if ctx.needs_input_grad[2]:
            to_bias = out.sum(0, dtype=torch.float32).to(out.dtype)
        return to_x, to_weight, to_bias


def _rows_of(weight: Tensor) -> Iterator[slice]:
    """The pieces in which a weight (N, K) is widened: long rows are not worth thin products."""
    return _pieces(len(weight), max(_ROWS_AT_ONCE, _WEIGHTS_AT_ONCE // weight.shape[1]))


def _pieces(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def matmul_scope(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """The scope in which a model in `dtype` runs fastest on `device`: `Fp32Matmul`, or one without effect."""
    return nullcontext() if fast_matmul_supported(dtype, device.type) else Fp32Matmul()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _HALVES else value
    if isinstance(value, tuple | list):
        return type(value)(_widened(item) for item in value)
    return value
