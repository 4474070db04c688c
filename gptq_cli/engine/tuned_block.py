"""A block whose linears are packed, run with what is tuned in it.

Its weights are decoded when its turn comes, and dropped after: the block's own parameters of packed linears
stay empty, and each forward is given what to compute with in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gptq_cli.config import QuantizeConfig
from gptq_cli.devices.accelerators import torch_device, working_on
from gptq_cli.devices.host_buffers import to_device
from gptq_cli.engine.calls import BlockCall, hidden_of
from gptq_cli.engine.going_back import GoingBack
from gptq_cli.gptq.packing import PackedTensors, unpack
from gptq_cli.gptq.quantized import dequantized
from gptq_cli.gptq.tuning import Moving, scale_gradient
from gptq_cli.model.blocks import as_parameter
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.placement.schedule import BlockSchedule


@dataclass(frozen=True, slots=True)
class Codes:
    """What of a packed linear stays as it is."""

    codes: Tensor
    """uint8 (N, K)."""
    zeros: Tensor
    """uint8 (N, groups)."""
    g_idx: Tensor
    """int32 (K,)."""


@dataclass(slots=True)
class TunedLinear:
    """A packed linear."""

    info: LinearInfo
    config: QuantizeConfig
    """Its own settings."""
    checkpoint_format: str
    scales: Moving
    """(groups, N), as they lie in the file."""

    def unpacked(self, packed: PackedTensors, device: torch.device) -> Codes:
        """Its codes on `device`."""
        there = PackedTensors(
            qweight=packed.qweight.to(device),
            qzeros=packed.qzeros.to(device),
            scales=packed.scales,
            g_idx=packed.g_idx.to(device),
        )
        found = unpack(
            there, self.config.bits, self.checkpoint_format, self.info.in_features, self.info.out_features
        )
        return Codes(*found, there.g_idx)


@dataclass(slots=True)
class TunedBlock:
    """A block, its packed linears and its vectors, by their names inside it."""

    schedule: BlockSchedule
    module: nn.Module
    dtype: torch.dtype
    packed: Callable[[LinearInfo], PackedTensors]
    linears: dict[str, TunedLinear]
    vectors: dict[str, Moving]

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch_device(self.schedule.execution_device)

    @property
    def rest(self) -> torch.device:
        """Where what enters it waits."""
        return torch_device(self.schedule.activation_device)

    @contextmanager
    def decoded(self, part: float = 1.0, *, gradients: bool = False) -> Iterator[DecodedBlock]:
        """The block with its weights, `part` of the way of what moves; with `gradients` they have
        some."""
        values, codes = {}, {}
        with working_on(self.device):
            for name, linear in self.linears.items():
                codes[name] = held = linear.unpacked(self.packed(linear.info), self.device)
                scales = linear.scales.value(part).T
                weights = dequantized(held.codes, scales, held.zeros, held.g_idx, self.dtype)
                values[f"{name}.weight"] = as_parameter(self.module.get_submodule(name), weights)
            values |= {name: vector.value(part) for name, vector in self.vectors.items()}
            if gradients:
                values = {name: value.clone().requires_grad_() for name, value in values.items()}
            yield DecodedBlock(self, values, codes)


@dataclass(slots=True)
class DecodedBlock:
    """A block with its weights."""

    block: TunedBlock
    values: dict[str, Tensor]
    codes: dict[str, Codes] = field(default_factory=dict)
    _back: GoingBack = field(init=False)

    def __post_init__(self) -> None:
        self._back = GoingBack(self.block.module, self.block.device, self._forget)

    def _forget(self) -> None:
        for value in self.values.values():
            value.grad = None

    def run(self, call: BlockCall, hidden: Tensor) -> Tensor:
        """What the block hands on, on its device."""
        device = self.block.device

        def forward(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.block.module, self.values, args, kwargs)

        return hidden_of(call.to(device).rehearse(forward, to_device(hidden, device)))

    def run_all(self, calls: Sequence[BlockCall], hidden: Sequence[Tensor]) -> list[Tensor]:
        """The same for every micro-batch, without gradients, where hidden states rest."""
        with torch.no_grad():
            pairs = zip(calls, hidden, strict=True)
            return [to_device(self.run(call, entering), self.block.rest) for call, entering in pairs]

    def backward(self, call: BlockCall, hidden: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to what enters, from that with respect to what the block hands on; those
        of the values are added up in them. The same every time, where torch can."""
        return to_device(self._back(partial(self.run, call), hidden, gradient), self.block.rest)

    def step(self, tokens: int, rate: float) -> None:
        """Move what is tuned, by the gradients of the values, of a sum over `tokens`."""
        for name, linear in self.block.linears.items():
            found = self.values[f"{name}.weight"].grad
            if found is not None:
                held, module = self.codes[name], self.block.module.get_submodule(name)
                rows = as_parameter(module, found)  # (N, K): the transpose of a transpose
                gradient = scale_gradient(rows, held.codes, held.zeros, held.g_idx)
                linear.scales.step(gradient / tokens, rate)
        step_vectors(self.block.vectors, self.values, tokens, rate)


def step_vectors(
    vectors: Mapping[str, Moving], values: Mapping[str, Tensor], tokens: int, rate: float
) -> None:
    """Move the vectors that the loss depends on, by the gradients of their values, of a sum over `tokens`."""
    for name, vector in vectors.items():
        found = values[name].grad
        if found is not None:
            vector.step(found.float() / tokens, rate)
