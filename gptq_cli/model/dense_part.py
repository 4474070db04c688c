"""The model with a part of its weights in memory: what stays dense, or what lies outside the blocks.

Tuning runs the whole model again and again. What is quantized is decoded from its codes, one block at a time;
the embedding, the norms, the biases and the head are small beside it, or are needed all the time, and stay.
The pass that takes gradients begins behind the last block, and needs nothing of the blocks there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from gptq_cli.errors import CheckpointError, ModelError
from gptq_cli.model.conversion import Conversion
from gptq_cli.model.expert_linears import hollow
from gptq_cli.model.fill import Filler, all_tensors, check_filled, compute_buffers, empty_out
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.model.streamed import StreamedReader
from gptq_cli.model.text_part import uncalled_tensors
from gptq_cli.placement.names import parents


def open_dense_part(
    skeleton: Skeleton, device_of: Callable[[str], torch.device], *, behind: bool = False
) -> Any:
    """A copy of the skeleton's model: eval, no gradients, no cache. Weights that are packed stay on the meta
    device, as does what a forward on text does not call; all else is where `device_of` says.

    `behind`: for what lies behind the blocks alone. All that is in them stays on the meta device, and the
    head is there even where it is packed.

    Raises `ModelError` naming a tensor that cannot be read, and `SourceChanged`.
    """
    model: Any = copy.deepcopy(skeleton.model)
    model.requires_grad_(False)
    model.config.use_cache = False
    if not behind:
        hollow(model, [linear.name for linear in skeleton.linears])
    packed_linears = skeleton.linears if behind else skeleton.packed
    packed = {f"{name}.weight" for linear in packed_linears for name in (linear.name, *linear.also_at)}
    unread = packed | uncalled_tensors(model, skeleton.blocks, head=True)
    inside = _only_inside(model, skeleton) if behind else frozenset()
    unread |= inside
    filler = Filler(model, Conversion(model), skeleton.keys, skeleton.dtype)
    names = [name for name in filler.names if name not in unread]
    files = skeleton.files
    try:
        with StreamedReader(files.directory, files.tensors, files.stamps) as reader:
            filler.fill([name for name in names if name in skeleton.keys.origins], reader.get, device_of)
        compute_buffers(model, device_of)
        empty_out(model, inside)  # buffers of the blocks
        check_filled(model, names)
    except CheckpointError as error:
        raise ModelError(f"{files.source} cannot be loaded: {error.message}", hint=error.hint) from error
    return model


def _only_inside(model: Any, skeleton: Skeleton) -> frozenset[str]:
    """The tensors of the blocks that are not one with a tensor outside."""
    blocks = frozenset(skeleton.blocks)
    inside = {name for name, _ in all_tensors(model) if not blocks.isdisjoint(parents(name))}
    shared = {name for group in skeleton.tied if not inside.issuperset(group) for name in group}
    return frozenset(inside - shared)
