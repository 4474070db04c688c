"""Hidden states of some samples in a folder, a file for every block: the engine's `KeptStates` on a disk.

The folder is the run's own, so what an earlier start of the same job left there is of use once it came to
its end: that is known from a list of the files, which is written last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from gptq_cli.checkpoint.journal import JournalError, Part
from gptq_cli.checkpoint.snapshot import read_snapshot, write_snapshot
from gptq_cli.errors import GptqError
from gptq_cli.files import reason

_LIST = "complete.json"


class StatesOnDisk:
    """See `engine.gradients.KeptStates`."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made where something is written."""
        self._folder = folder
        self._parts: dict[int, Part] = {}
        self._read_list()

    def _read_list(self) -> None:
        try:
            listed = json.loads((self._folder / _LIST).read_bytes())
            parts = {int(block): Part(**part) for block, part in listed.items()}
            there = all((self._folder / p.file).stat().st_size == p.size_bytes for p in parts.values())
        except (OSError, ValueError, TypeError, AttributeError):  # not there, or not whole: taken again
            return
        if there:
            self._parts = parts

    @property
    def complete(self) -> bool:
        """See `KeptStates.complete`."""
        return bool(self._parts) and (self._folder / _LIST).is_file()

    def write(self, block: int, states: Mapping[int, Tensor]) -> None:
        """See `KeptStates.write`. Raises `GptqError` where the disk does not take it."""
        path = self._folder / f"{block:05d}.safetensors"
        new = path.with_suffix(".new")
        with self._on_disk():
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / _LIST).unlink(missing_ok=True)  # it speaks of what is written over
            part = write_snapshot(new, ((str(sample), state) for sample, state in states.items()))
            os.replace(new, path)
        self._parts[block] = Part(path.name, part.size_bytes, part.digest)

    def read(self, block: int) -> Mapping[int, Callable[[], Tensor]]:
        """See `KeptStates.read`."""
        try:
            found = read_snapshot(self._folder, self._parts[block])
        except JournalError as error:
            with self._on_disk():
                (self._folder / _LIST).unlink(missing_ok=True)
            raise GptqError(
                f"{self._folder}: the gradients of block {block} cannot be used: {error}",
                hint="start the same command again: they are taken anew",
            ) from error
        return {int(sample): get for sample, get in found.items()}

    def problem(self, first: int) -> str:
        """Why those of block `first` and of the ones after it are not as they were kept; "" where they are.
        What is not is no longer complete, and will be taken again."""
        if not self.complete:
            return "a file is missing, or has another size"
        for block in sorted(number for number in self._parts if number >= first):
            try:
                read_snapshot(self._folder, self._parts[block])
            except JournalError as error:
                with self._on_disk():
                    (self._folder / _LIST).unlink(missing_ok=True)
                return str(error)
        return ""

    def finish(self) -> None:
        """See `KeptStates.finish`."""
        listed = {block: asdict(part) for block, part in self._parts.items()}
        new = self._folder / f"{_LIST}.new"
        with self._on_disk():
            new.write_text(json.dumps(listed), encoding="utf-8")
            os.replace(new, self._folder / _LIST)

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise GptqError(
                f"the dense model's gradients cannot be kept in {self._folder}: {reason(error)}",
                hint="make room there, or give --fisher-tokens 0, which does without",
            ) from error
