"""Facts of the world for the rules: the skeleton in plain numbers, the output's place, the environment.

This module is the only one of the room that knows torch models and the file system; everything else here
works on what it returns.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from gptq_cli.checkpoint.destination import Destination
from gptq_cli.checkpoint.place import Place, is_empty, looks_like_checkpoint, may_be_removed, may_write
from gptq_cli.checkpoint.working_folder import is_taken, tree_bytes, why_taken
from gptq_cli.errors import DestinationBusy
from gptq_cli.fields import Resume
from gptq_cli.model.source_files import link_to_nothing
from gptq_cli.placement.device import VISIBLE_VARIABLES, Device
from gptq_cli.planning.cases import Capability, Environment, OutputFacts, UnfinishedWork


@dataclass(frozen=True, slots=True)
class Claim:
    """What came of claiming the output for this run: the destination, or why it could not be."""

    destination: Destination | None
    failure: str = ""


def environment_facts() -> Environment:
    """The variables in force that change what a device index means."""
    visible = tuple((name, os.environ[name]) for name in VISIBLE_VARIABLES if name in os.environ)
    local_rank = None if _joined() else os.environ.get("LOCAL_RANK")
    return Environment(local_rank=local_rank, visible=visible)


def _joined() -> bool:
    """Whether this process works together with those that a launcher started, as it meant it."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def output_facts(
    out: str,
    model_directory: Path | None,
    claim: Claim | None = None,
    *,
    work: UnfinishedWork | None = None,
    resume: Resume = "auto",
) -> OutputFacts:
    """The state of the place that the checkpoint is to go to. Touches nothing.

    `claim`: what came of claiming it; without one, what would be found is looked up. `work`: unfinished work
    that is there.
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
    begun = tree_bytes(place.folder) if work is not None else 0
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
        free_bytes=shutil.disk_usage(parent).free + freed + begun,
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
        why_taken=why_taken(place.folder) if is_taken(place.folder) else "",
        unlocked=unlocked,
        resume=resume,
        work=work,
        parent_is_file=not os.path.isdir(parent),
        link_to_nothing=link_to_nothing(Path(os.path.expanduser(given))),
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
    import torch

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
