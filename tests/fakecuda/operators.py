"""Operators of CUDA for which a CPU build of torch has no kernel, in Python.

The layout of torch's int4 weights is private on a card, too, and differs from card to card: here the elements
of a tile lie in an order that was drawn by lot, once for each `inner`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_registered: list[torch.library.Library] = []


def register() -> None:
    """Put them under the CUDA dispatch key; they stay as long as the process."""
    library = torch.library.Library("aten", "IMPL")
    here = globals()  # asked at each call, so that a test may put another one in its place
    library.impl("histc", lambda *args, **options: here["histc"](*args, **options), "CUDA")
    library.impl(
        "_convert_weight_to_int4pack", lambda *args: here["convert_weight_to_int4pack"](*args), "CUDA"
    )
    library.impl("_weight_int4pack_mm", lambda *args: here["weight_int4pack_mm"](*args), "CUDA")
    library.impl("addmm.dtype_out", lambda *args, **options: here["addmm_into"](*args, **options), "CUDA")
    library.impl("mm.dtype", lambda *args: here["mm_into"](*args), "CUDA")
    library.impl("scaled_dot_product_attention", _attention, "AutogradCUDA")
    _registered.append(library)


def _attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    """torch's own chooses a fused kernel by device, and a CPU build has none for CUDA."""
    if any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *options.values())):
        raise NotImplementedError("the make-believe card has no gradient for a mask of attention")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        found: Tensor = _Attention.apply(args, options, q, k, v)  # type: ignore[no-untyped-call]
        return found
    with torch._C._AutoDispatchBelowAutograd():
        return scaled_dot_product_attention(q, k, v, *args, **options)


class _Attention(torch.autograd.Function):
    """With the gradients that the CPU gives."""

    @staticmethod
    def forward(ctx: Any, args: tuple[Any, ...], options: dict[str, Any], *qkv: Tensor) -> Tensor:
        ctx.args, ctx.options = args, options
        ctx.save_for_backward(*qkv)
        with torch._C._AutoDispatchBelowAutograd():
            return scaled_dot_product_attention(*qkv, *args, **options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        given: list[Tensor] = [x.detach().cpu().requires_grad_() for x in ctx.saved_tensors]
        args = [x.cpu() if isinstance(x, Tensor) else x for x in ctx.args]
        options = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in ctx.options.items()}
        with torch.enable_grad():
            out = scaled_dot_product_attention(*given, *args, **options)
        found = torch.autograd.grad(out, given, gradient.cpu())
        return None, None, *(x.to(gradient.device) for x in found)


def histc(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:  # noqa: A002 - torch's names
    """torch.histc, which on CUDA counts integers as well: Transformers counts the tokens of experts so."""
    return torch.histc(x.cpu().float(), bins, min, max).to(x.dtype).to(x.device)


def addmm_into(
    C: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    """torch.addmm of 16-bit factors with a result of `dtype`."""
    return out.copy_(beta * C.to(dtype) + alpha * mm_into(A, B, dtype))


def mm_into(A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """torch.mm of 16-bit factors with a result of `dtype`."""
    return A.to(dtype) @ B.to(dtype)


def convert_weight_to_int4pack(
    pairs: Tensor,  # (N, K / 2) uint8: the even column's code in the high half
    inner: int,
) -> Tensor:  # (N / 8, K / (16 inner), 32, inner / 2) int32
    """Tiles of 8 rows x 16 inner columns, the elements of each in an order of their own."""
    given = pairs.cpu()
    n, k = given.shape[0], 2 * given.shape[1]
    codes = torch.stack([given >> 4, given & 15], -1).view(n, k).to(torch.int32)
    tiles = codes.view(n // 8, 8, k // (16 * inner), 16 * inner).permute(0, 2, 1, 3)
    tiles = tiles.reshape(n // 8, -1, 128 * inner)
    words = tiles[..., _order(inner)].view(n // 8, -1, 16 * inner, 8)
    packed = (words << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1)
    return packed.view(n // 8, -1, 32, inner // 2).to(torch.int32).to(pairs.device)


def weight_int4pack_mm(
    x: Tensor,  # (M, K)
    packed: Tensor,
    group: int,
    scales_shifts: Tensor,  # (K / group, N, 2)
) -> Tensor:  # (M, N)
    """x Wᵀ with W = (codes - 8) * scale + shift, rounded to x's dtype; sums are fp32."""
    words = packed.cpu()
    inner = 2 * words.shape[3]
    flat = words.reshape(words.shape[0], words.shape[1], -1, 1)
    shuffled = (flat >> torch.arange(0, 32, 4, dtype=torch.int32) & 15).flatten(-2)
    tiles = torch.empty_like(shuffled)
    tiles[..., _order(inner)] = shuffled
    columns = words.shape[1] * 16 * inner
    codes = tiles.view(words.shape[0], -1, 8, 16 * inner).permute(0, 2, 1, 3).reshape(-1, columns)
    scales, shifts = scales_shifts.cpu().float().repeat_interleave(group, 0).permute(2, 1, 0)
    dense = ((codes - 8) * scales + shifts).to(x.dtype)
    return (x.cpu().float() @ dense.float().T).to(x.dtype).to(x.device)


def _order(inner: int) -> Tensor:
    return torch.randperm(128 * inner, generator=torch.Generator().manual_seed(inner))
