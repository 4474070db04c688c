"""The journal of a run: what is finished of it, so that the same command run again goes on from there.

In the working folder (`working_folder.py`), beside the checkpoint that is being written:

    journal/
      manifest.json         fingerprint, starts, and by name and digest all that follows
      block-00017.json      the report of a finished block, and a digest of each of its packed tensors
      hidden-18.safetensors what enters block 18, see `checkpoint.snapshot`
      tuned.safetensors     new values of scales and vectors, which are then written into the checkpoint

A block is finished when the manifest names it. Its tensors are on the disk before its file is written, and
its file before the manifest; the manifest is replaced by a rename. So whatever ends a run, the journal is
that of the last finished block. Nothing in it is trusted: what does not have the digest that the manifest
names, and a manifest without its own, is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from gptq_cli.checkpoint.fingerprint import Fingerprint
from gptq_cli.checkpoint.renames import fsync
from gptq_cli.results.run import BlockReport, StartReport, TuningReport

MANIFEST, TUNED = "manifest.json", "tuned.safetensors"
VERSION = 1
_LIMIT_BYTES = 1 << 30
T = TypeVar("T")


class JournalError(Exception):
    """A part of a journal that cannot be used; the message says why. Caught by whoever reads journals."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file of the journal, as the manifest names it."""

    file: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The hidden states that enter block number `block`."""

    block: int
    part: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedBlock:
    """A block whose tensors are on the disk."""

    report: BlockReport
    tensors: dict[str, str]
    """Name of a packed tensor -> digest of its bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedTuning:
    """All blocks are tuned."""

    report: TuningReport
    part: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is finished."""

    version: int = VERSION
    fingerprint: Fingerprint
    asked: Fingerprint | None = None
    """What was asked for about bits: noted, to be named where the fingerprints differ."""
    total: int
    """Blocks of the model."""
    starts: tuple[StartReport, ...]
    written: tuple[tuple[str, int], ...] = ()
    """Files with weights and their modification times when the run began: noted, not compared."""
    warnings: tuple[str, ...] = ()
    """All that were given, by every start."""
    gradients: bool = False
    """Those of the dense model are all in their folder, see `kept_states.py`."""
    blocks: tuple[Part, ...] = ()
    snapshot: Snapshot | None = None
    tuning: FinishedTuning | None = None


def _encoded(value: Manifest | FinishedBlock) -> bytes:
    return json.dumps(asdict(value), separators=(",", ":")).encode()


def _decoded(adapter: TypeAdapter[T], text: bytes) -> T:
    """What `_encoded` made into JSON, checked by pydantic."""
    try:
        return adapter.validate_python(json.loads(text))
    except (ValidationError, ValueError, RecursionError) as error:
        raise JournalError("it is not what this version writes") from error


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """Made once: it takes pydantic some 10 ms, and there is a file for each block."""
    return TypeAdapter(kind)


def digest(data: bytes | memoryview) -> str:
    """The digest by which a journal knows bytes again: 128 bits of BLAKE2b, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class Journal:
    """The journal in `folder`; `manifest` is what the file there says, or will say when it is first written.

    Every method that writes raises `OSError`.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def read(cls, folder: Path) -> Journal:
        """The journal that is there. Raises `JournalError`."""
        text = _read(folder / MANIFEST)
        body, _, said = text.rpartition(b"\n")
        if digest(body).encode() != said:
            raise JournalError(f"{MANIFEST} is damaged: its digest does not fit")
        manifest = _decoded(_adapter(Manifest), body)
        if manifest.version != VERSION:
            raise JournalError(f"{MANIFEST} has version {manifest.version}; this program writes {VERSION}")
        return cls(folder, manifest)

    def commit(self, manifest: Manifest) -> None:
        """Make `manifest` that of the journal, in one step."""
        self.folder.mkdir(exist_ok=True)
        body = _encoded(manifest)
        new = self.folder / f"{MANIFEST}.new"
        _write(new, body + b"\n" + digest(body).encode())
        os.replace(new, self.folder / MANIFEST)
        fsync(self.folder)
        fsync(self.folder.parent)
        self.manifest = manifest

    def write_block(self, number: int, block: FinishedBlock) -> Part:
        """Write the file of a block; `commit` of a manifest that names it makes it count."""
        self.folder.mkdir(exist_ok=True)
        body = _encoded(block)
        name = f"block-{number:05d}.json"
        _write(self.folder / name, body)
        fsync(self.folder)
        return Part(name, len(body), digest(body))

    def read_block(self, number: int) -> FinishedBlock:
        """A finished block. Raises `JournalError`."""
        part = self.manifest.blocks[number]
        text = _read(self.folder / part.file)
        if digest(text) != part.digest:
            raise JournalError(f"{part.file} is damaged: its digest does not fit")
        block: FinishedBlock = _decoded(_adapter(FinishedBlock), text)
        return block

    def without(self, first: int) -> Manifest:
        """The manifest with block number `first` and all after it taken back."""
        snapshot = self.manifest.snapshot
        kept = snapshot if snapshot is not None and snapshot.block <= first else None
        return replace(self.manifest, blocks=self.manifest.blocks[:first], snapshot=kept, tuning=None)

    def tidy(self) -> None:
        """Remove files that the manifest does not name: a run wrote them and ended before it did."""
        named = {MANIFEST, *(part.file for part in self.manifest.blocks)}
        if self.manifest.snapshot is not None:
            named.add(self.manifest.snapshot.part.file)
        if self.manifest.tuning is not None:
            named.add(self.manifest.tuning.part.file)
        with contextlib.suppress(OSError):
            for name in sorted(set(os.listdir(self.folder)) - named):
                if name.startswith(("block-", "hidden-", TUNED, MANIFEST)):
                    (self.folder / name).unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(_LIMIT_BYTES + 1)
    except FileNotFoundError as error:
        raise JournalError(f"{path.name} is missing") from error
    except OSError as error:
        raise JournalError(f"{path.name} cannot be read: {error.strerror}") from error
    if len(text) > _LIMIT_BYTES:
        raise JournalError(f"{path.name} has more than {_LIMIT_BYTES} bytes")
    return text


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
