"""A decoder block of the opened model, and what the work on all of them has in common."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from gptq_cli.config import QuantizeConfig
from gptq_cli.devices.accelerators import torch_device
from gptq_cli.engine.gradients import Gradients
from gptq_cli.engine.shared import Places, SharedWeights, nothing_shared
from gptq_cli.events import Observer
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.placement.schedule import BlockSchedule
from gptq_cli.ranks.team import ALONE, Team

Store = Callable[[LinearInfo, PackedTensors], None]
"""Takes a finished linear; the tensors are its own to keep."""


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block of the opened model, and how it is to be worked on."""

    schedule: BlockSchedule
    module: nn.Module
    linears: tuple[LinearInfo, ...]
    shared: Places = field(default_factory=dict)
    """Its linears whose weights are those of linears of earlier blocks."""
    on_device: Callable[[], AbstractContextManager[object]] = nullcontext
    """A context that has the block on its execution device and takes it back to its storage device."""

    @property
    def name(self) -> str:
        """The dotted name: `model.layers.3`."""
        return self.schedule.name

    @property
    def device(self) -> torch.device:
        """Where it is worked on."""
        return torch_device(self.schedule.execution_device)

    @property
    def own(self) -> dict[str, LinearInfo]:
        """The linears that are quantized here, by their names inside the block."""
        return {self.relative(info): info for info in self.linears}

    def relative(self, info: LinearInfo) -> str:
        """The name of a linear inside the block: `self_attn.q_proj`."""
        return info.name[len(self.name) + 1 :]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOptions:
    """What the work on every block of a run has in common."""

    config: QuantizeConfig
    strict: bool
    """End the run rather than fall back to round-to-nearest."""
    store: Store
    observer: Observer
    shared: SharedWeights = field(default_factory=nothing_shared)
    gradients: Gradients | None = None
    """The dense model's, where rows are to make up for each other."""
    team: Team = ALONE
