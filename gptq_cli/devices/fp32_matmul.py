"""16-bit models on a processor without 16-bit matmul instructions.

Without AVX512_BF16 or AMX a CPU multiplies bf16 matrices at a tenth of its fp32 speed, and a model in that
dtype is very slow. Running the model in fp32 would double the memory of weights and activations and change
the operations between the matmuls. `Fp32Matmul` changes the matmuls only: operands are widened to fp32,
multiplied, and the result is rounded once to the dtype it would have had. Processors with 16-bit instructions
compute the same (exact products, fp32 sums, one rounding), so a model's outputs agree on both, up to the
order of summation.

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
_ROWS_AT_ONCE = 512
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
    """Inside `with`, in this thread, matmuls of 16-bit CPU tensors are computed in fp32 and rounded.

    Attention kernels (scaled_dot_product_attention) do so themselves.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called by torch for every function; only matmuls are changed."""
        kwargs = kwargs or {}
        if func in _LEFT and "out" not in kwargs:
            operands = list(_tensors((*args, *kwargs.values())))
            if _worth_widening(operands, _LEFT[func]):
                if func is functional.linear and not kwargs:
                    return _linear(*args)
                wide = {name: _widened(value) for name, value in kwargs.items()}
                return func(*_widened(args), **wide).to(operands[0].dtype)
        return func(*args, **kwargs)


def _worth_widening(operands: list[Tensor], left: int) -> bool:
    """True for at least `_MIN_ROWS` rows, all of one 16-bit dtype and on the CPU."""
    if len({(operand.dtype, operand.device.type) for operand in operands}) != 1 or left >= len(operands):
        return False
    factor = operands[left]
    tall = factor.ndim > 1 and factor.numel() >= _MIN_ROWS * factor.shape[-1]
    return tall and factor.dtype in _HALVES and factor.device.type == "cpu"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Some rows at a time, so that the widened rows stay in the cache and reuse the same memory."""
    rows = x.reshape(-1, x.shape[-1])
    wide, wide_bias = weight.float(), None if bias is None else bias.float()
    out = x.new_empty(rows.shape[0], weight.shape[0])
    for start in range(0, rows.shape[0], _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        out[part] = functional.linear(rows[part].float(), wide, wide_bias)
    return out.view(*x.shape[:-1], weight.shape[0])


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
