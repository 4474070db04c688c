"""Facts of the world for the rules: the skeleton in plain numbers, the output's place, the environment.

This module is the only one of the room that knows torch models and the file system; everything else here
works on what it returns.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from gptq_cli.device import Device
from gptq_cli.errors import DestinationBusy
from gptq_cli.model.checkpoint import PARTS, QuantizedCheckpoint
from gptq_cli.model.conversion import tied_groups
from gptq_cli.model.destination import Destination
from gptq_cli.model.place import Place, is_empty, looks_like_checkpoint, may_be_removed, may_write
from gptq_cli.model.skeleton import LinearInfo, Skeleton
from gptq_cli.model.trace import Trace, trace
from gptq_cli.model.working_folder import is_taken
from gptq_cli.placement import LinearFact, ModelFacts, TensorFact
from gptq_cli.preflight.cases import Capability, Environment, OutputFacts

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "ASCEND_RT_VISIBLE_DEVICES")


@dataclass(frozen=True, slots=True)
class Claim:
    """What came of claiming the output for this run: the destination, or why it could not be."""

    destination: Destination | None
    failure: str = ""


def model_facts(skeleton: Skeleton) -> ModelFacts:
    """The skeleton in plain numbers."""
    model, config = skeleton.model, skeleton.config.get_text_config()
    traced = skeleton.trace
    stages = stage_numbers(traced, skeleton.linears)
    return ModelFacts(
        model=skeleton.ref.model,
        architecture=type(model).__name__,
        dtype=str(skeleton.dtype).removeprefix("torch."),
        hidden_size=int(config.hidden_size),
        vocab_size=int(getattr(config, "vocab_size", 0) or 0),
        max_positions=getattr(config, "max_position_embeddings", None),
        blocks=skeleton.blocks,
        modules=tuple(name for name, _ in model.named_modules() if name),
        order=traced.order if traced.complete else (),
        untraced=traced.problem,
        tensors=_tensors(model),
        tied=skeleton.tied,
        linears=tuple(
            LinearFact(
                name=info.name,
                block=info.block,
                in_features=info.in_features,
                out_features=info.out_features,
                stage=stages[info.name],
                chosen=traced.complete and info.name in traced.idle,
            )
            for info in skeleton.linears
        ),
        fused=_fused(model, skeleton.blocks),
        already_quantized=skeleton.already_quantized,
        tensor_files_bytes=skeleton.files.size_bytes,
    )


def checkpoint_facts(checkpoint: QuantizedCheckpoint) -> ModelFacts:
    """A quantized checkpoint in plain numbers: its packed linears with the bytes they have in the files."""
    model, config = checkpoint.model, checkpoint.config.get_text_config()
    traced = trace(model, {})
    stored = {tensor.name: tensor.size_bytes for tensor in checkpoint.tensors}
    packed = {
        f"{info.name}.weight": sum(stored.get(f"{info.source_name}.{part}", 0) for part in PARTS)
        for info in checkpoint.linears
    }
    return ModelFacts(
        model=str(checkpoint.directory),
        architecture=type(model).__name__,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        hidden_size=int(config.hidden_size),
        vocab_size=int(getattr(config, "vocab_size", 0) or 0),
        max_positions=getattr(config, "max_position_embeddings", None),
        blocks=checkpoint.blocks,
        modules=tuple(name for name, _ in model.named_modules() if name),
        order=traced.order if traced.complete else (),
        untraced=traced.problem,
        tensors=tuple(
            replace(fact, size_bytes=packed.get(fact.name, fact.size_bytes)) for fact in _tensors(model)
        ),
        tied=tied_groups(model),
        tensor_files_bytes=checkpoint.packed_bytes,
    )


def stage_numbers(traced: Trace, linears: Sequence[LinearInfo]) -> dict[str, int]:
    """Number of the stage of each linear inside its block, in order of execution.

    A linear that did not run is a stage of its own, after the others. Where the trace is not complete, the
    linears with one parent and one K count as a stage, which overestimates memory if anything.
    """
    owner = {info.name: info.block for info in linears}
    if traced.complete:
        known = [[name for name in stage if name in owner] for stage in traced.stages]
        known += [[name] for name in owner if name in traced.idle]
    else:
        alike: dict[tuple[str, str, int], list[str]] = {}
        for info in linears:
            key = (info.block, info.name.rpartition(".")[0], info.in_features)
            alike.setdefault(key, []).append(info.name)
        known = list(alike.values())
    numbers: dict[str, int] = {}
    counts: dict[str, int] = {}
    for stage in filter(None, known):
        block = owner[stage[0]]
        numbers.update(dict.fromkeys(stage, counts.get(block, 0)))
        counts[block] = counts.get(block, 0) + 1
    return numbers


def _tensors(model: nn.Module) -> tuple[TensorFact, ...]:
    """Parameters and buffers in module order; a tied one under its first name."""
    found: list[tuple[str, Tensor, bool]] = [(name, p, False) for name, p in model.named_parameters()]
    found += [(name, b, True) for name, b in model.named_buffers()]
    rank = {name: index for index, (name, _) in enumerate(model.named_modules())}
    found.sort(key=lambda item: rank[item[0].rpartition(".")[0]])
    return tuple(
        TensorFact(name, t.numel(), t.numel() * t.element_size(), buffer) for name, t, buffer in found
    )


def _fused(model: nn.Module, blocks: Sequence[str]) -> tuple[str, ...]:
    inside = tuple(f"{block}." for block in blocks)
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and name.startswith(inside) and parameter.shape[0] > 1
    )


def environment_facts() -> Environment:
    """The variables in force that change what a device index means."""
    visible = tuple((name, os.environ[name]) for name in _VISIBLE if name in os.environ)
    return Environment(local_rank=os.environ.get("LOCAL_RANK"), visible=visible)


def output_facts(out: str, model_directory: Path | None, claim: Claim | None = None) -> OutputFacts:
    """The state of the place that the checkpoint is to go to. Touches nothing.

    `claim`: what came of claiming it; without one, what would be found is looked up.
    """
    is_text = "\0" not in out and not any("\ud800" <= letter <= "\udfff" for letter in out)
    given = out.replace("\0", "?")
    place = Place.of(given)
    parent = place.out if place.inside else place.out.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    name_bytes = max((len(os.fsencode(part)) for part in place.out.parts), default=0)
    there = place.standing
    directory = os.path.isdir(there)
    checkpoint = directory and looks_like_checkpoint(there)
    source = model_directory.resolve() if model_directory is not None else None
    busy, busy_hint = ("", "") if claim is not None else _busy(place)
    leftovers, freed = ("", 0) if claim is not None or busy else place.left_over(done=False)
    if claim is not None and claim.destination is not None:
        cleared, unlocked = claim.destination.cleared, claim.destination.unlocked
    else:
        cleared, unlocked = ((leftovers,) if leftovers else ()), ""
    return OutputFacts(
        out=out,
        exists=os.path.lexists(os.path.expanduser(given)) or there != place.out,
        is_directory=directory,
        is_empty_directory=directory and is_empty(place),
        is_checkpoint=checkpoint,
        is_model_directory=source is not None and (place.out == source or place.out in source.parents),
        writable=may_write(parent),
        parent=str(parent),
        free_bytes=shutil.disk_usage(parent).free + freed,
        name_bytes=name_bytes,
        longest_name_bytes=longest,
        is_text=is_text,
        is_fixed=place.inside,
        is_removable=not checkpoint or may_be_removed(there),
        failure=claim.failure if claim is not None else "",
        busy=busy,
        busy_hint=busy_hint,
        leftovers=cleared,
        folder_taken=str(place.folder) if is_taken(place.folder) else "",
        unlocked=unlocked,
        free=_free_place(Path(os.path.expanduser(given)), place.out),
    )


def _free_place(path: Path, real: Path) -> str:
    """A name beside `path` that nothing has: `out-2`, `out-3`, …; `real` is where it leads."""
    named = path if path.name not in ("", "..") else real
    stem = named.name or "model"
    candidates = (named.parent / f"{stem}-{number}" for number in count(2))
    return str(next(candidate for candidate in candidates if not os.path.lexists(candidate)))


def _busy(place: Place) -> tuple[str, str]:
    try:
        place.check_free()
    except DestinationBusy as error:
        return error.message, error.hint or ""
    return "", ""


def capabilities(devices: Sequence[Device]) -> tuple[Capability, ...]:
    """What the accelerators among `devices` can compute with; devices that are not there are left out."""
    found = []
    for device in devices:
        if (
            device.kind == "cuda"
            and torch.cuda.is_available()
            and (device.index or 0) < torch.cuda.device_count()
        ):
            properties = torch.cuda.get_device_properties(device.index)
            native = torch.version.hip is not None or properties.major >= 8
            found.append(Capability(device, properties.name, native))
    return tuple(found)
