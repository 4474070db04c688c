"""Linears on the kernels of the gptqmodel package (Marlin, ExLlamaV2, Triton, …), on request.

The package is optional and heavy: importing it takes seconds, and some of its kernels compile on first use.
It is imported for `--kernel gptqmodel` only. It chooses the kernel of every linear by its own rules; a linear
that none of its kernels takes is an error that names the linear, never a silent change of kernel.

What a kernel computes is checked: the first linear of every kernel and setting runs on one token, and its
result must match the checkpoint. (gptqmodel 7.6 accepts asymmetric codes in float32 on a CPU, and is 25 %
off.)
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.checkpoint.checkpoint import PackedInfo
from gptq_cli.checkpoint.codes import codes_of, dequantize, unpack_zeros
from gptq_cli.checkpoint.zeros import shift_words, store_zeros
from gptq_cli.errors import CheckpointError, ConfigError
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.wording import first_line

_TOLERANCE = 0.05
"""Relative, on one token; kernels in bfloat16 are within about 0.01."""
_AUTO_HINT = "use --kernel auto, which needs no other package"


class GptqmodelLinear(nn.Module):
    """y = x Wᵀ + b by a kernel of gptqmodel."""

    kernel_name = "gptqmodel"
    max_fused_tokens = 0

    def __init__(self, inner: Any, dtype: torch.dtype, parameters_packed: int) -> None:
        super().__init__()
        self.inner = inner
        self.parameters_packed = parameters_packed
        """Parameters of the dense linear that this one replaces."""
        self.reason = f"requested, {type(inner).__name__}"
        self._dtype = dtype

    @property
    def weight(self) -> Tensor:
        """An empty tensor with the right dtype and device, for architectures that read these."""
        tensor = next(tensor for found in (self.inner.buffers(), self.inner.parameters()) for tensor in found)
        stand_in = torch.empty(0, dtype=self._dtype, device=tensor.device)
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
        return stand_in

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        product = self.inner(x)
        assert isinstance(product, Tensor)
        return product


@dataclass(frozen=True, slots=True)
class _Trial:
    """One token for one linear, and the output it must give."""

    name: str
    module: GptqmodelLinear
    x: Tensor  # (1, K)
    expected: Tensor  # (1, N) float32

    @classmethod
    def of(
        cls,
        info: PackedInfo,
        packed: PackedTensors,
        bias: Tensor | None,
        module: GptqmodelLinear,
        dtype: torch.dtype,
    ) -> _Trial:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, info.in_features, generator=generator).to(packed.qweight.device, dtype)
        expected = x.float() @ dequantize(codes_of(info, packed)).t()
        return cls(info.source_name, module, x, expected if bias is None else expected + bias.float())

    def validate(self) -> None:
        kernel = type(self.module.inner).__name__
        try:
            with torch.inference_mode():
                found = self.module(self.x).float()
        except RuntimeError as error:
            raise _not_served(self.name, f"{kernel} fails: {first_line(error)}") from error
        apart = float((found - self.expected).norm() / self.expected.norm())
        if not apart <= _TOLERANCE:
            raise _not_served(self.name, f"the output of {kernel} is off by {apart:.0%}")


class GptqmodelKernels:
    """The package, opened once per load; `build` makes linears, `finish` prepares them for use."""

    def __init__(self) -> None:
        """Import the package. Raises `ConfigError` where it is not installed or lacks the expected names."""
        if importlib.util.find_spec("gptqmodel") is None:
            raise ConfigError(
                "kernel is 'gptqmodel', but the package gptqmodel is not installed",
                hint=f"pip install gptqmodel, or {_AUTO_HINT}",
            )
        try:
            from gptqmodel.quantization import FORMAT, METHOD
            from gptqmodel.utils.backend import BACKEND
            from gptqmodel.utils.importer import select_quant_linear, validate_quant_linear
            from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, hf_gptqmodel_post_init
        except (ImportError, OSError) as error:
            raise ConfigError(
                f"kernel is 'gptqmodel', but the installed package cannot be used: {error}",
                hint=f"pip install 'gptqmodel>=7.6', or {_AUTO_HINT}",
            ) from error
        self._format, self._method, self._backend = FORMAT, METHOD.GPTQ, BACKEND.AUTO
        self._select, self._validate = select_quant_linear, validate_quant_linear
        self._to_v2, self._post_init = convert_gptq_v1_to_v2_format_module, hf_gptqmodel_post_init
        self._known: dict[tuple[object, ...], list[Any]] = {}
        self._trials: dict[tuple[object, ...], _Trial] = {}

    def build(
        self, info: PackedInfo, packed: PackedTensors, bias: Tensor | None, dtype: torch.dtype
    ) -> GptqmodelLinear:
        """One linear on the device of its tensors. Raises `CheckpointError` where no kernel takes it."""
        form = info.format
        settings: dict[str, Any] = {
            "bits": form.bits,
            "group_size": form.group_size,
            "desc_act": form.desc_act,
            "sym": form.sym,
            "pack_dtype": torch.int32,
            "dtype": dtype,
        }
        shape = {"in_features": info.in_features, "out_features": info.out_features}
        device = packed.qweight.device
        refusals = []
        for kernel in self._candidates(settings, form.checkpoint_format, device, info.source_name):
            fits, why = self._validate(kernel, **settings, **shape, device=device)
            if not fits:
                refusals.append(str(why))
                continue
            try:
                inner = kernel(
                    **settings,
                    **shape,
                    bias=bias is not None,
                    name=info.source_name,
                    backend=self._backend,
                    register_buffers=True,
                    adapter=None,
                    format=self._format(form.checkpoint_format),
                )
            except NotImplementedError as error:
                refusals.append(str(error))
                continue
            self._fill(inner.to(device), info, packed, bias)
            biases = 0 if bias is None else bias.numel()
            module = GptqmodelLinear(inner, dtype, info.in_features * info.out_features + biases)
            key = (kernel, *settings.values(), str(device))
            if key not in self._trials:
                self._trials[key] = _Trial.of(info, packed, bias, module, dtype)
            return module
        raise _not_served(info.source_name, refusals[0] if refusals else "none of its kernels takes it")

    def finish(self, model: nn.Module, *, desc_act: bool) -> None:
        """After all linears are in place: scratch space, repacking, whatever the kernels need before use.

        Raises `CheckpointError` where a kernel does not compute what the checkpoint says.
        """
        self._post_init(model, use_act_order=desc_act)
        while self._trials:
            _, trial = self._trials.popitem()
            trial.validate()

    def _candidates(
        self, settings: dict[str, Any], checkpoint_format: str, device: torch.device, name: str
    ) -> list[Any]:
        """The kernels that gptqmodel would try, best first."""
        key = (*settings.values(), checkpoint_format, str(device))
        if key not in self._known:
            try:
                found = self._select(
                    **settings,
                    device=device,
                    backend=self._backend,
                    format=self._format(checkpoint_format),
                    quant_method=self._method,
                    multi_select=True,
                )
            except (NotImplementedError, ValueError) as error:
                raise _not_served(name, str(error)) from error
            self._known[key] = found
        return self._known[key]

    def _fill(self, inner: Any, info: PackedInfo, packed: PackedTensors, bias: Tensor | None) -> None:
        to_v2 = inner.REQUIRES_FORMAT_V2 and info.format.checkpoint_format == "gptq"
        tensors = {
            "qweight": packed.qweight,
            "qzeros": self._own_zeros(info, packed) if to_v2 else packed.qzeros,
            "scales": packed.scales,
            "g_idx": packed.g_idx,
        }
        if bias is not None:
            tensors["bias"] = bias
        try:
            unplaced = inner.load_state_dict(tensors, strict=False).unexpected_keys
        except RuntimeError as error:  # a shape
            raise _not_served(info.source_name, str(error).splitlines()[-1].strip()) from error
        if set(unplaced) & {"qweight", "scales", "bias"}:
            raise _not_served(info.source_name, f"{type(inner).__name__} has no place for {unplaced[0]}")
        if to_v2:
            self._to_v2(inner, bits=info.format.bits, pack_dtype=torch.int32)

    @staticmethod
    def _own_zeros(info: PackedInfo, packed: PackedTensors) -> Tensor:
        """Zeros of format gptq as the package expects them: it adds 1 per whole word, with 3 bits per
        field."""
        bits = info.format.bits
        if bits == 3:
            return packed.qzeros
        zeros = unpack_zeros(packed.qzeros, bits, info.out_features, "gptq").to(torch.uint8)
        return shift_words(store_zeros(zeros, bits, "gptq_v2"), bits, -1)


def _not_served(name: str, why: str) -> CheckpointError:
    return CheckpointError(f"gptqmodel has no kernel for {name}: {why}", hint=_AUTO_HINT)
