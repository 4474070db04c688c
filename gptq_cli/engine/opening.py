"""What one run of the engine is given, and its model opened: blocks have weights when their turn comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from gptq_cli.config import QuantizeConfig
from gptq_cli.devices.accelerators import torch_device
from gptq_cli.engine.gradients import KeptStates, StatesInMemory
from gptq_cli.engine.loop import LoopOptions
from gptq_cli.engine.work import Block
from gptq_cli.events import Observer, Warned
from gptq_cli.model.block_stream import BlockStream
from gptq_cli.model.shards import Shards
from gptq_cli.model.skeleton import LinearInfo, Skeleton
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRun:
    """What one run of the engine is given."""

    skeleton: Skeleton
    placement: Placement
    schedule: Schedule
    """How the run is carried out; made for this placement."""
    config: QuantizeConfig
    options: LoopOptions
    shards: Shards | None = None
    """Where the bytes of the weights come from; None: the files that the skeleton names."""
    states: KeptStates = field(default_factory=StatesInMemory)
    """Where hidden states and gradients of the dense model are kept, see `gradients`."""


def open_stream(run: EngineRun, observer: Observer, order: Sequence[str] | None = None) -> BlockStream:
    """The model of the run, each block of which has its weights when its turn comes; in the order of the work
    unless another is given."""
    return BlockStream(
        run.skeleton,
        run.placement,
        order=order or [block.name for block in run.schedule.blocks],
        reads_ahead=run.schedule.reads_ahead,
        shards=run.shards,
        looks_at_all=run.options.team.rank == 0,
        tell=lambda words: observer(Warned(words, "it only takes longer")),
    )


def opened_blocks(model: Any, run: EngineRun, stream: BlockStream) -> list[Block]:
    """The blocks of the opened model, in order."""
    return [
        Block(
            schedule,
            model.get_submodule(schedule.name),
            run.skeleton.linears_of(schedule.name),
            shared=_shared(run.skeleton, schedule.name),
            on_device=partial(stream.on_device, schedule.name),
        )
        for schedule in run.schedule.blocks
    ]


def _shared(skeleton: Skeleton, block: str) -> dict[str, LinearInfo]:
    """The linears of the block whose weights are those of linears of earlier blocks."""
    order = skeleton.blocks.index
    return {
        name.removeprefix(f"{block}."): linear
        for linear in skeleton.linears
        if order(linear.block) < order(block)
        for name in linear.also_at
        if name.startswith(f"{block}.")
    }


def input_device_of(model: Any, main: Device) -> torch.device:
    """Where token ids enter: an embedding on the CPU beside accelerators visits the main device."""
    embedding: torch.device = model.get_input_embeddings().weight.device
    return torch_device(main) if main != CPU and embedding.type == "cpu" else embedding
