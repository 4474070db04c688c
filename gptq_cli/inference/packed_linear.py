"""The module that replaces a linear, and the choice of its kernel.

`PackedLinear` multiplies its input by codes that stay packed. It keeps one copy of them, in the layout of its
kernel, and chooses by the number of tokens between the fused kernel and dequantize-and-GEMM. Where torch's
operator for a fused kernel raises, at load or later, the linear dequantizes instead, and `reason` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from gptq_cli.checkpoint.codes import LinearCodes
from gptq_cli.config import KernelChoice
from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.gptq.matmul import fast_matmul_supported
from gptq_cli.inference.crossover import Crossovers
from gptq_cli.inference.kernels import (
    Buffers,
    CpuInt4,
    Dequantize,
    Kernel,
    Tinygemm,
    XpuInt4,
    cpu_block,
)
from gptq_cli.inference.nibble_layout import COLUMN_BLOCK, make_nibble_layout, why_not_fused
from gptq_cli.inference.scratch import Fresh, Scratch, usable
from gptq_cli.model.facts import dtype_name
from gptq_cli.wording import first_line

_CPU_DENSE_ELEMENTS = 1 << 21
_DEVICE_DENSE_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class Choice:
    """A kernel class and why it was chosen."""

    kernel: type[Kernel]
    reason: str


def choose(
    linear: LinearCodes, device: torch.device, dtype: torch.dtype, kernel_choice: KernelChoice
) -> Choice:
    """The best kernel for `linear` on `device` with activations in `dtype`."""
    if kernel_choice == "dequantize":
        return Choice(Dequantize, "requested")
    obstacle = why_not_fused(linear)
    if obstacle is not None:
        return Choice(Dequantize, obstacle)
    return _for_device(device, dtype)


def _for_device(device: torch.device, dtype: torch.dtype) -> Choice:
    name = dtype_name(dtype)
    match device.type:
        case "cpu" if dtype != torch.bfloat16:
            return Choice(Dequantize, f"CPUs have a fast int4 kernel for bfloat16 only, not for {name}")
        case "cpu" if cpu_block() is None:
            return Choice(Dequantize, "the layout of torch's int4 kernel on this CPU is unknown")
        case "cpu":
            return Choice(CpuInt4, "bfloat16 on a CPU")
        case "cuda" if dtype != torch.bfloat16:
            return Choice(Dequantize, f"CUDA has an int4 kernel for bfloat16 only, not for {name}")
        case "cuda" if torch.version.hip is not None:
            return Choice(Dequantize, "torch's int4 kernel is not used under ROCm")
        case "cuda" if torch.cuda.get_device_capability(device) < (8, 0):
            return Choice(Dequantize, "torch's int4 kernel needs compute capability 8.0")
        case "cuda":
            return Choice(Tinygemm, "bfloat16 on CUDA")
        case "xpu" if dtype in (torch.bfloat16, torch.float16):
            return Choice(XpuInt4, f"{name} on XPU")
        case kind:
            return Choice(Dequantize, f"torch has no int4 kernel for {name} on {kind}")


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with W in 2, 3, 4 or 8 bits. Takes the place of nn.Linear and of Conv1D."""

    packed: Tensor
    bias: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        linear: LinearCodes,
        *,
        bias: Tensor | None,
        dtype: torch.dtype,
        crossovers: Crossovers,
        scratch: Scratch,
        kernel_choice: KernelChoice = "auto",
    ) -> None:
        """Build on the device of `linear`. `scratch` is shared by the linears of a model."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.group_size = linear.bits, linear.group
        choice = choose(linear, linear.device, dtype, kernel_choice)
        try:
            self.kernel, buffers, max_fused_tokens = _built(choice.kernel, linear, dtype, crossovers)
        except (RuntimeError, AttributeError) as error:  # AttributeError: torch does not have the operator
            if not choice.kernel.can_fuse or is_out_of_memory(error):
                raise
            choice = Choice(Dequantize, _failing(choice.kernel, error))
            self.kernel, buffers, max_fused_tokens = _built(choice.kernel, linear, dtype, crossovers)
        self.reason = choice.reason
        self._kernel_buffer_names = tuple(buffers)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.register_buffer("order", linear.order)
        self.register_buffer("bias", bias)
        self.max_fused_tokens = max_fused_tokens
        """Up to this many tokens the fused kernel is used."""
        self._scratch = scratch
        self._row_padding = self.kernel.rows - self.in_features

    @property
    def kernel_name(self) -> str:
        """Which kernel, for reports."""
        return self.kernel.name if self.max_fused_tokens else Dequantize.name

    @property
    def parameters_packed(self) -> int:
        """Parameters of the dense linear that this one replaces."""
        return self.in_features * self.out_features + (0 if self.bias is None else self.bias.numel())

    @property
    def kernel_buffers(self) -> Buffers:
        """The kernel's buffers, looked up each time because hooks and `.to()` replace them."""
        registered = self._buffers
        return {
            name: tensor for name in self._kernel_buffer_names if (tensor := registered[name]) is not None
        }

    @property
    def weight(self) -> Tensor:
        """An empty tensor with the right dtype and device, for architectures that read these.

        It is marked as initialized, so that Transformers' initialization leaves it alone.
        """
        stand_in = self.packed.new_empty(0, dtype=self.kernel.dtype)
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
        return stand_in

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        rows = x.reshape(-1, x.shape[-1])
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        if self._row_padding:
            rows = functional.pad(rows, (0, self._row_padding))
        kernel = self.kernel
        if 0 < rows.shape[0] <= self.max_fused_tokens and rows.dtype == kernel.dtype:
            wide = rows.contiguous() if kernel.nibbles_per_code == 1 else torch.cat([rows, rows], 1)
            try:
                out = kernel.fused(wide, self.kernel_buffers)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self.max_fused_tokens, self.reason = 0, _failing(type(kernel), error)
                out = self._dequantize_and_multiply(rows)
        else:
            out = self._dequantize_and_multiply(rows)
        if kernel.columns != self.out_features:
            out = out[:, : self.out_features]
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)

    def _dequantize_and_multiply(self, rows: Tensor) -> Tensor:
        """Multiply by one piece of the dense weight after another, so that it never exists as a whole.

        Where a CPU is slow in the dtype, the matmul runs in float32 and the result is rounded once.
        """
        kernel, buffers = self.kernel, self.kernel_buffers
        on_cpu = rows.device.type == "cpu"
        dtype = rows.dtype if fast_matmul_supported(rows.dtype, rows.device.type) else torch.float32
        memory = self._scratch if usable(rows) else Fresh()
        step = (_CPU_DENSE_ELEMENTS if on_cpu else _DEVICE_DENSE_ELEMENTS) // kernel.rows
        step = max(COLUMN_BLOCK, step // COLUMN_BLOCK * COLUMN_BLOCK)
        left = rows.to(dtype)
        pieces = []
        for start in range(0, kernel.columns, step):
            stop = min(start + step, kernel.columns)
            piece = torch.mm(left, kernel.dense(buffers, start, stop, dtype, memory))
            pieces.append(piece.to(rows.dtype))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def extra_repr(self) -> str:
        """Shape, bits and kernel, for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, kernel={self.kernel.name}"
        )


def _built(
    kind: type[Kernel], linear: LinearCodes, dtype: torch.dtype, crossovers: Crossovers
) -> tuple[Kernel, Buffers, int]:
    """A kernel, its buffers for `linear`, and the number of tokens up to which its fused form is used."""
    layout = make_nibble_layout(linear, fused=kind.can_fuse)
    kernel = kind(layout, dtype)
    buffers = kernel.make_buffers(layout)
    return kernel, buffers, crossovers.max_fused_tokens(kernel, buffers)


def _failing(kind: type[Kernel], error: Exception) -> str:
    return f"torch's operator for {kind.name} fails: {first_line(error)}"
