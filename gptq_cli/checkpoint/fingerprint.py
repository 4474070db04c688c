"""What two runs must have in common so that the second may go on where the first ended.

Equal fingerprints mean equal codes and equal files: the same bytes of the model, the same tokens, the same
settings, the same maths. The settings are taken from the fields of the job's configuration, all of them, so
that a new field counts from the day it is added; those that change neither a code nor a file are listed in
`FREE`. The device map, the batch size, the machine and the display are among them. Whether a repository's own
code is run is not: it may be another forward, and its files go into the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Self

from gptq_cli.calibration import TokenBatches
from gptq_cli.checkpoint.layout import plan_checkpoint
from gptq_cli.config import QuantizeJob
from gptq_cli.gptq.version import MATHS_VERSION
from gptq_cli.model.facts import dtype_name
from gptq_cli.model.headers import header_digest
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.model.source_files import FileStamp
from gptq_cli.results.document import to_json

FREE = frozenset(
    {
        "model.model",  # the files themselves are compared
        "model.revision",
        "model.dtype",  # "auto" is compared as what it stands for
        "out",
        "calibration.sources",  # the tokens themselves are compared
        "calibration.seed",
        "calibration.batch_size",
        "device_map",
        "max_memory",
        "devices",
        "overwrite",
        "strict",
        "targets",  # what readers accept is checked beforehand, on so many ranks as `tp` says
        "tp",
        "resume",
        "asked_before",  # the settings that were chosen are compared
        "command_line",
    }
)
"""Fields of a `QuantizeJob` that may differ."""
_BITS = frozenset(
    {"quantize.bits", "quantize.bits_per_weight", "quantize.modules", "quantize.quantize_head", "layout"}
)
"""Names of what a budget of bits decides, and of what is asked for in its place."""
_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that two runs do not have in common. An empty text: it was not there."""

    name: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.name} ({self.before or 'absent'}, now {self.now or 'absent'})"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Names and values, in order."""

    values: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, job: QuantizeJob, skeleton: Skeleton, tokens: TokenBatches) -> Self:
        """That of a job whose group size is a number. Reads the headers of the model's files."""
        plan = plan_checkpoint(skeleton, job.quantize, job.max_shard_bytes)
        headers = hashlib.sha256(b"".join(shard.header for shard in plan.shards))
        return cls(
            (
                ("maths", str(MATHS_VERSION)),
                ("dtype", dtype_name(skeleton.dtype)),
                *settings_of(job),
                ("tokens", tokens.sha256[:_DIGITS]),
                ("layout", headers.hexdigest()[:_DIGITS]),
                *((f"file {stamp.name}", _file_text(skeleton, stamp)) for stamp in skeleton.files.stamps),
            )
        )

    def differences(self, now: Fingerprint) -> tuple[Difference, ...]:
        """What is new, gone or changed in `now`."""
        before, after = dict(self.values), dict(now.values)
        names = dict.fromkeys([*before, *after])
        return tuple(
            Difference(name, before.get(name, ""), after.get(name, ""))
            for name in names
            if before.get(name) != after.get(name)
        )


def bits_asked(job: QuantizeJob) -> Fingerprint:
    """What a job asks for about bits, as it was given: before a budget is spent."""
    return Fingerprint(tuple((name, value) for name, value in settings_of(job) if name in _BITS))


def in_words_of_the_job(
    found: tuple[Difference, ...], asked: tuple[Difference, ...]
) -> tuple[Difference, ...]:
    """Differences of two runs, with those in what the jobs asked for in the place of what was chosen."""
    return (*asked, *(one for one in found if one.name not in _BITS)) if found and asked else found


def model_digest(skeleton: Skeleton) -> str:
    """Of the model's files, and the dtype that it runs in."""
    hashed = hashlib.sha256(dtype_name(skeleton.dtype).encode())
    for stamp in skeleton.files.stamps:
        hashed.update(f"\n{stamp.name} {_file_text(skeleton, stamp)}".encode())
    return hashed.hexdigest()


def settings_of(job: QuantizeJob) -> Iterator[tuple[str, str]]:
    """(name, value) of every field that is not free; those of nested configurations as `quantize.bits`."""
    yield from ((name, value) for name, value in _fields(job, "") if name not in FREE)


def _fields(value: Any, above: str) -> Iterator[tuple[str, str]]:
    for item in fields(value):
        name, held = f"{above}{item.name}", getattr(value, item.name)
        nested = is_dataclass(held) and type(held).__str__ is object.__str__
        if name not in FREE and nested:
            yield from _fields(held, f"{name}.")
        else:
            yield name, str(to_json(held)) if name not in FREE else ""


def _file_text(skeleton: Skeleton, stamp: FileStamp) -> str:
    """Size and digests of a file; of weights, which are too large to be read twice, header and a sample."""
    parts = [f"{stamp.size_bytes} bytes", stamp.digest.hex()[:_DIGITS]]
    if stamp.name.endswith(".safetensors"):
        parts.append(header_digest(skeleton.files.directory / stamp.name)[:_DIGITS])
    return " ".join(parts)
