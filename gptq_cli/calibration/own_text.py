"""Text that a model wrote itself: which text is asked for, in which rows it is written, and where it is kept.

Writing takes as long as some blocks of the quantization, so what is written is kept: every batch of rows is a
file in the user's cache, under a digest of all that the text depends on (the model's files, the requests, the
sizes, the seed). A run that is interrupted goes on after the last batch, and the next run with the same model
reads all of them. A file is written beside its place and renamed; its content is compared with its digest
whenever it is read, and what does not fit is written again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptq_cli.calibration.prompts import page_digest, read_prompts
from gptq_cli.calibration.text_form import TextForm, text_form
from gptq_cli.calibration.writing import STRETCH, check_decoding, write_rows
from gptq_cli.devices.accelerators import flush
from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.files import reason
from gptq_cli.model.running import input_device
from gptq_cli.user_cache import CACHE_VARIABLE, cache_directory, written_beside

VERSION = 1
"""Of the way in which text is written: raised when the same model would write another text."""
MAX_ROWS = 64
CACHE_BYTES = {"cpu": 1 << 29}
"""What the keys and values of a batch of rows may take, by kind of device."""
ACCELERATOR_CACHE_BYTES = 8 << 30

OnTokens = Callable[[int, int], None]
"""Called with (tokens written, tokens in all)."""
OnNote = Callable[[str, str], None]
"""Called with a message and a hint: something about the files of the text is not as it should be."""


@dataclass(frozen=True, slots=True)
class OwnText:
    """What a model wrote."""

    input_ids: Tensor
    """(samples, seq_len) int64, on the CPU."""
    answers: Tensor
    """(samples, seq_len) bool: True for tokens that the model wrote, False for those that were given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which text is asked for."""

    model: str
    """A digest of the model's files, its dtype among what it covers."""
    samples: int
    seq_len: int
    seed: int
    held_out: bool
    """Written on the requests that are kept for measuring."""

    @property
    def key(self) -> str:
        """Digest of all that the text depends on."""
        parts = asdict(self) | {"version": VERSION, "page": page_digest(), "stretch": STRETCH}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def rows_of_window(self) -> int:
        """Rows that a window is made of."""
        return -(-self.seq_len // STRETCH)

    @property
    def rows(self) -> int:
        """Rows of all windows."""
        return self.samples * self.rows_of_window

    @property
    def row_tokens(self) -> int:
        """Tokens of a row."""
        return -(-self.seq_len // self.rows_of_window)

    @property
    def tokens(self) -> int:
        """Tokens that are written or given."""
        return self.rows * self.row_tokens


@dataclass(frozen=True, slots=True)
class _Rows:
    ids: Tensor  # (rows, row_tokens) int64
    own: Tensor  # (rows, row_tokens) bool


class TextStore:
    """Texts that models wrote: of this process, and in the user's cache."""

    def __init__(self, on_note: OnNote = lambda message, hint: None) -> None:
        self._on_note = on_note
        self._known: dict[str, list[_Rows]] = {}
        self._not_kept = False
        """That text is not kept was said; once is enough, of however many files."""

    def find(self, wanted: Wanted) -> OwnText | None:
        """The whole text, if it is there."""
        parts = self._parts(wanted)
        if sum(len(part.ids) for part in parts) < wanted.rows:
            return None
        ids, own = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "own"))
        shape = (wanted.samples, wanted.rows_of_window * wanted.row_tokens)
        return OwnText(
            ids.reshape(shape)[:, : wanted.seq_len].contiguous(),
            own.reshape(shape)[:, : wanted.seq_len].contiguous(),
        )

    def written_rows(self, wanted: Wanted) -> int:
        """Rows of the text that are there: from these on it is written."""
        return sum(len(part.ids) for part in self._parts(wanted))

    def write(
        self, wanted: Wanted, model: Any, tokenizer: Any, on_tokens: OnTokens = lambda done, total: None
    ) -> OwnText:
        """The whole text; `model` writes what is not there yet, batch by batch.

        Raises `CalibrationError` where the model or its chat template cannot be used, `NonFinite`.
        """
        form = text_form(tokenizer, model, read_prompts(held_out=wanted.held_out), wanted.seed)
        check_decoding(model, form)
        parts = self._parts(wanted)
        at_once = rows_at_once(model, wanted.row_tokens, input_device(model).type)
        while (first := sum(len(part.ids) for part in parts)) < wanted.rows:
            numbers = range(first, min(wanted.rows, first + at_once))
            part = _written(model, form, wanted, numbers, on_tokens)
            if part is None:
                at_once = max(1, at_once // 2)
                continue
            parts.append(part)
            self._keep(wanted, first, part)
        found = self.find(wanted)
        assert found is not None  # all rows are there
        return found

    def _parts(self, wanted: Wanted) -> list[_Rows]:
        """Consecutive batches of rows from the first one on; what is damaged is left out."""
        key = wanted.key
        if key not in self._known:
            self._known[key] = list(self._stored(wanted))
        return self._known[key]

    def _stored(self, wanted: Wanted) -> list[_Rows]:
        parts: list[_Rows] = []
        first = 0
        try:
            while first < wanted.rows and (path := _path(wanted, first)).is_file():
                part = _read(path, wanted, wanted.rows - first)
                if isinstance(part, str):
                    self._on_note(f"{path} is not used: {part}", "the text is written again")
                    break
                parts.append(part)
                first += len(part.ids)
        except OSError as error:
            self._on_note(f"kept text cannot be read: {reason(error)}", "the text is written again")
        return parts

    def _keep(self, wanted: Wanted, first: int, part: _Rows) -> None:
        path = None
        try:
            path = _path(wanted, first)
            _store(path, wanted, part)
        except (OSError, SafetensorError) as error:
            where = "" if path is None else f" in {path.parent}"
            why = reason(error) if isinstance(error, OSError) else str(error)
            if not self._not_kept:
                self._on_note(
                    f"the text is not kept{where}: {why}",
                    f"an interrupted run writes it again; {CACHE_VARIABLE} names another directory",
                )
            self._not_kept = True


def rows_at_once(model: Any, row_tokens: int, device: str) -> int:
    """Rows that are written side by side: what the keys and values of so many tokens leave room for.

    Depends on the model and the kind of device alone, so that equal runs write equal texts.
    """
    limit = CACHE_BYTES.get(device, ACCELERATOR_CACHE_BYTES)
    fits = max(1, limit // max(1, row_bytes(model, row_tokens)))
    return min(MAX_ROWS, 1 << (fits.bit_length() - 1))


def row_bytes(model: Any, row_tokens: int) -> int:
    """Keys and values of one row in every block: as much as plain attention takes; other kinds take less."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None) or 1
    heads = max(heads) if isinstance(heads, list | tuple) else heads
    width = int(getattr(config, "hidden_size", 1024) or 1024)
    size = getattr(config, "head_dim", None) or width // int(getattr(config, "num_attention_heads", 1) or 1)
    layers = int(getattr(config, "num_hidden_layers", 32) or 32)
    element = int(model.get_input_embeddings().weight.element_size())
    return 2 * layers * int(heads) * int(size) * element * row_tokens


def _written(model: Any, form: TextForm, wanted: Wanted, numbers: range, on_tokens: OnTokens) -> _Rows | None:
    """A batch of rows; None where a device has no memory for so many at once."""
    done = [numbers[0] * wanted.row_tokens]

    def advanced(tokens: int) -> None:
        done[0] += tokens
        on_tokens(done[0], wanted.tokens)

    try:
        written = write_rows(model, form, numbers, wanted.rows, wanted.row_tokens, wanted.seed, advanced)
        return _Rows(*written)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(numbers) == 1:
            raise
    flush(())  # outside: the error holds the forward's tensors
    return None


def _path(wanted: Wanted, first: int) -> Path:
    return cache_directory() / "text" / wanted.key[:32] / f"rows-{first:06}.safetensors"


def _store(path: Path, wanted: Wanted, part: _Rows) -> None:
    """Write a batch of rows. Raises `OSError`, `SafetensorError`."""
    tensors = {"ids": part.ids.to(torch.int32), "own": part.own.to(torch.uint8)}
    about = {"text": f"{wanted.key} {_digest(tensors)}"}  # several would be written in any order
    with written_beside(path) as beside:
        save_file(tensors, beside, metadata=about)


def _read(path: Path, wanted: Wanted, most: int) -> _Rows | str:
    """A batch of at most `most` rows, or why it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if set(file.keys()) != {"ids", "own"}:
                return "it holds other tensors"
            tensors = {name: file.get_tensor(name) for name in ("ids", "own")}
    except (SafetensorError, ValueError, KeyError) as error:
        return f"it is damaged ({error})"
    ids, own = tensors["ids"], tensors["own"]
    key, _, digest = about.get("text", "").partition(" ")
    if key != wanted.key:
        return "it belongs to another text"
    if (ids.dtype, own.dtype) != (torch.int32, torch.uint8) or ids.shape != own.shape or ids.dim() != 2:
        return "it is damaged"
    if ids.shape[1] != wanted.row_tokens or not 1 <= len(ids) <= most:
        return "its size does not fit"
    if digest != _digest(tensors):
        return "its digest does not fit"
    return _Rows(ids.to(torch.int64), own.bool())


def _digest(tensors: dict[str, Tensor]) -> str:
    hashed = hashlib.sha256()
    for name in ("ids", "own"):
        hashed.update(tensors[name].contiguous().numpy().tobytes())
    return hashed.hexdigest()
