"""From documents to token windows: a run's calibration samples, and the windows for perplexity.

All documents become one row of tokens, with the tokenizer's end-of-text token between two documents. The row
is cut into consecutive windows. Calibration divides the windows into as many equal stretches as it needs
samples and takes one window out of each, drawn by a local generator: the samples cover the text evenly for
every seed, and different seeds take different windows. Evaluation takes the first windows in order.

Where the tokenizer puts a begin-of-text token before every text, every window begins with it too, as one of
its tokens: models trained with one (Llama, Gemma) behave differently without it.

Several sources are cut and drawn each by itself, their windows mixed by their shares of the samples
(`gptq_cli.text_sources`).

A text is read only as far as needed: about `POOL` times the tokens required. The row then ends where a piece
ended, which depends only on the text, the tokenizer and the size of the request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gptq_cli.calibration.answers import conversation_windows
from gptq_cli.calibration.conversations import Conversations
from gptq_cli.calibration.documents import PIECE_CHARACTERS, Documents, Piece
from gptq_cli.calibration.own_text import OwnText
from gptq_cli.calibration.rows import Render
from gptq_cli.calibration.text import check_distinct, read_documents, to_measure_on
from gptq_cli.calibration.utf8 import SOURCES_HINT
from gptq_cli.config import CalibrationConfig
from gptq_cli.errors import CalibrationError
from gptq_cli.results.run import TextShare
from gptq_cli.text_sources import OWN_TEXT, TextSource, interleaved
from gptq_cli.wording import number_of

POOL = 8
"""Tokens read for each token required, where the text has them."""
MIN_WINDOW = 32
"""The smallest window that a hint suggests, in tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatches:
    """Windows of tokens, and their source."""

    input_ids: Tensor
    """(samples, seq_len) int64, on the CPU."""
    shares: tuple[TextShare, ...]
    """The sources and what was taken of each, in the order in which they were given."""
    sha256: str
    """Hex digest of `input_ids` as little-endian int64, row by row."""
    seed: int | None
    """Seed of the draw; None for evaluation windows, which are not drawn."""
    tokens_available: int
    """Tokens that were read."""
    windows_available: int
    """Windows that the tokens fill; `samples` of them were taken."""
    read_to_end: bool
    """True when the text was read to its end."""
    answers: Tensor | None = None
    """(samples, seq_len) bool: True for tokens of answers, where the text is conversations; else None."""
    left_out: int = 0
    """Conversations with no answer within a window."""
    too_long: int = 0
    """Conversations of more characters than are tokenized at once."""
    joined: int = 0
    """Conversations that were read as their messages in turn, for want of a chat template."""
    table: str = ""
    """What a source looks like that was read as plain text: `JSON lines`; "" where it looks like text."""

    @property
    def source(self) -> str:
        """Name in reports: `pydoc (Python 3.11.7)`; of several with their windows."""
        if len(self.shares) == 1:
            return self.shares[0].source
        return ", ".join(f"{share.samples} of {share.source}" for share in self.shares)

    @property
    def samples(self) -> int:
        """Number of windows."""
        return self.input_ids.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens per window."""
        return self.input_ids.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self.input_ids.numel()


def make_batches(
    tokenizer: Any,
    config: CalibrationConfig,
    *,
    vocab_size: int | None = None,
    stdin: BinaryIO | None = None,
    own: OwnText | None = None,
) -> TokenBatches:
    """Cut the sources of `config` into `config.samples` windows of `config.seq_len` tokens.

    `own` is what the model wrote for the source `self`; `vocab_size` is the number of rows of the model's
    embedding, to detect another model's tokenizer. The same text, tokenizer and config give the same ids on
    every machine. Raises `CalibrationError`, whose message names the source.
    """
    parts = batches_by_source(tokenizer, config, vocab_size=vocab_size, stdin=stdin)
    return mixed([own_batches(own, config, vocab_size) if part is None else part for part in parts])


def batches_by_source(
    tokenizer: Any,
    config: CalibrationConfig,
    *,
    vocab_size: int | None,
    stdin: BinaryIO | None = None,
) -> tuple[TokenBatches | None, ...]:
    """The windows of each source by itself; None for what the model writes. Raises `CalibrationError`."""
    check_distinct([source.name for source in config.sources])
    return tuple(
        None if source.name == OWN_TEXT else _drawn(tokenizer, source, samples, config, vocab_size, stdin)
        for source, samples in zip(config.sources, config.windows_by_source(), strict=True)
    )


def own_batches(own: OwnText | None, config: CalibrationConfig, vocab_size: int | None) -> TokenBatches:
    """What the model wrote, as it stands: its windows are not drawn. Raises `CalibrationError` for None."""
    if own is None:
        raise CalibrationError(f"{OWN_TEXT} is what the model writes, and it has not written yet")
    weight = next((source.weight for source in config.sources if source.name == OWN_TEXT), 1.0)
    return _own(own, config.seed, vocab_size, weight)


def own_windows(own: OwnText, vocab_size: int | None = None) -> TokenBatches:
    """What a model wrote to be measured on. Raises `CalibrationError` where it wrote no word."""
    if not bool(own.answers[:, 1:].any()):
        raise CalibrationError(
            f"the windows of {own.input_ids.shape[1]} tokens have no room for an answer",
            hint="give longer ones: --seq-len 512",
        )
    return _own(own, None, vocab_size)


def _own(own: OwnText, seed: int | None, vocab_size: int | None, weight: float = 1.0) -> TokenBatches:
    row = _TokenRow(own.input_ids.flatten(), read_to_end=True)
    found = _batches(own.input_ids, OWN_TEXT, row, len(own.input_ids), seed, vocab_size, weight)
    return replace(found, answers=own.answers)


def _drawn(
    tokenizer: Any,
    source: TextSource,
    samples: int,
    config: CalibrationConfig,
    vocab_size: int | None,
    stdin: BinaryIO | None,
) -> TokenBatches:
    """`samples` windows of one source."""
    documents = read_documents(source.name, render=_renderer(tokenizer), stdin=stdin)
    row = _tokenize(tokenizer, documents, POOL * samples * config.seq_len)
    windows = _cut_windows(tokenizer, row.ids, config.seq_len)
    if windows.shape[0] < samples:
        raise _too_little(documents.label, row.ids.numel(), windows.shape[0], samples, config)
    generator = torch.Generator().manual_seed(config.seed)
    drawn = _one_of_each_stretch(windows.shape[0], samples, generator)
    label = documents.label
    return _batches(windows[drawn], label, row, windows.shape[0], config.seed, vocab_size, source.weight)


def mixed(parts: Sequence[TokenBatches]) -> TokenBatches:
    """The windows of several sources, in an order in which every stretch holds them by their shares."""
    if len(parts) == 1:
        return parts[0]
    order = interleaved([part.samples for part in parts])
    ids = torch.stack([parts[source].input_ids[index] for source, index in order])
    return TokenBatches(
        input_ids=ids,
        shares=tuple(share for part in parts for share in part.shares),
        sha256=_digest(ids),
        seed=parts[0].seed,
        tokens_available=sum(part.tokens_available for part in parts),
        windows_available=sum(part.windows_available for part in parts),
        read_to_end=all(part.read_to_end for part in parts),
        joined=sum(part.joined for part in parts),
        table=next((part.table for part in parts if part.table), ""),
    )


def evaluation_windows(
    tokenizer: Any,
    source: str,
    seq_len: int,
    windows: int,
    *,
    vocab_size: int | None = None,
    stdin: BinaryIO | None = None,
) -> TokenBatches:
    """The first `windows` consecutive windows of `source`, in order; fewer where the text ends before.

    Of conversations that go through the chat template, the windows hold whole ones, and their answers are
    marked (`answers`). Raises `CalibrationError` when the text does not fill one window, or no answer does.
    """
    with to_measure_on(source):
        render = _renderer(tokenizer)
        documents = read_documents(source, render=render, stdin=stdin)
        first = next(documents.pieces, None)
        if first is not None:
            documents = Documents(documents.label, chain((first,), documents.pieces))
        if first is not None and first.rendered and render is not None:
            found = conversation_windows(tokenizer, documents, seq_len, windows, render)
            if found is not None:
                ids, label = found.input_ids, documents.label
                whole = _TokenRow(ids.flatten(), read_to_end=False)
                batches = _batches(ids, label, whole, len(ids), None, vocab_size)
                return replace(
                    batches, answers=found.counts, left_out=found.left_out, too_long=found.too_long
                )
            documents = read_documents(source, render=render, stdin=stdin)
        row = _tokenize(tokenizer, documents, windows * seq_len)
        cut, tokens = _cut_windows(tokenizer, row.ids, seq_len), row.ids.numel()
        if cut.shape[0] == 0:
            raise CalibrationError(
                f"{documents.label} holds {number_of(tokens, 'token')}; "
                f"at least one window of {seq_len} is needed",
                hint=f"give more text, or a shorter window: --seq-len {max(2, tokens)}"
                if tokens >= MIN_WINDOW
                else "give more text",
            )
        return _batches(cut[:windows].clone(), documents.label, row, cut.shape[0], None, vocab_size)


@dataclass(frozen=True, slots=True)
class _TokenRow:
    ids: Tensor  # (tokens,) int64
    read_to_end: bool
    joined: int = 0
    table: str = ""


def _renderer(tokenizer: Any) -> Render | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    return Conversations(tokenizer)


def _groups(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists of about `PIECE_CHARACTERS`, so that many short documents are tokenized at once."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + len(piece.text) > PIECE_CHARACTERS * 3 // 2:  # two long ones are two groups
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece.text)
        if size >= PIECE_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _tokenize(tokenizer: Any, documents: Documents, enough: int) -> _TokenRow:
    """Tokens of the documents, until there are `enough` or the documents end."""
    between = tokenizer.eos_token_id
    parts: list[Tensor] = []
    count = joined = 0
    table = ""
    for group in _groups(documents.pieces):
        encoded = tokenizer(
            [piece.text for piece in group],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,  # no "sequence is longer than the maximum": the windows are cut below
        )["input_ids"]
        for piece, ids in zip(group, encoded, strict=True):
            if piece.opens and parts and between is not None:
                parts.append(torch.tensor([between], dtype=torch.int64))
                count += 1
            parts.append(torch.tensor(ids, dtype=torch.int64))
            count += len(ids)
            joined += piece.joined
            table = table or piece.table
        if count >= enough:
            return _TokenRow(torch.cat(parts), read_to_end=False, joined=joined, table=table)
    whole = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    return _TokenRow(whole, read_to_end=True, joined=joined, table=table)


def _cut_windows(tokenizer: Any, ids: Tensor, seq_len: int) -> Tensor:
    """(windows, seq_len): consecutive stretches, each after a begin token where the tokenizer adds one."""
    begin = _begin_token(tokenizer)
    if begin is None:
        return ids[: ids.numel() // seq_len * seq_len].view(-1, seq_len)
    fresh = seq_len - 1
    body = ids[: ids.numel() // fresh * fresh].view(-1, fresh)
    return torch.cat([torch.full((body.shape[0], 1), begin, dtype=torch.int64), body], dim=1)


def _begin_token(tokenizer: Any) -> int | None:
    """The begin-of-text token, if the tokenizer puts one before every text by itself."""
    begin: int | None = tokenizer.bos_token_id
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return begin if begin is not None and list(first) == [begin] else None


def _one_of_each_stretch(windows: int, samples: int, generator: torch.Generator) -> Tensor:
    """(samples,) ascending window numbers: one out of each of `samples` stretches of equal length (± 1)."""
    borders = torch.arange(samples + 1, dtype=torch.int64) * windows // samples
    lengths = borders[1:] - borders[:-1]
    # 31 random bits modulo a length of at most millions: even to 1e-3, and the same on every machine
    draws = torch.randint(2**31, (samples,), generator=generator, dtype=torch.int64)
    return borders[:-1] + draws % lengths


def _batches(
    ids: Tensor,
    label: str,
    row: _TokenRow,
    available: int,
    seed: int | None,
    vocab_size: int | None,
    weight: float = 1.0,
) -> TokenBatches:
    largest = int(ids.max())
    if vocab_size is not None and largest >= vocab_size:
        raise CalibrationError(
            f"the tokenizer makes token {largest}, but the model's embedding has {vocab_size} rows",
            hint="the tokenizer belongs to another model; copy the model's own tokenizer files beside it",
        )
    share = TextShare(source=label, weight=weight, samples=ids.shape[0], tokens=ids.numel())
    return TokenBatches(
        input_ids=ids,
        shares=(share,),
        sha256=_digest(ids),
        seed=seed,
        tokens_available=row.ids.numel(),
        windows_available=available,
        read_to_end=row.read_to_end,
        joined=row.joined,
        table=row.table,
    )


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


def _too_little(
    label: str, tokens: int, windows: int, samples: int, config: CalibrationConfig
) -> CalibrationError:
    """The error with the number of windows there are, and settings that would work."""
    many = len(config.sources) > 1
    ways = []
    if windows and not many:
        ways.append(f"--samples {windows} --seq-len {config.seq_len}")
    if windows and many:
        ways.append(f"a smaller weight for it, or --samples {max(1, config.samples * windows // samples)}")
    shorter = 1 << (tokens // samples).bit_length() >> 1  # the power of two below
    if shorter >= MIN_WINDOW:
        ways.append(f"--samples {config.samples} --seq-len {shorter}")
    ways.append("a longer text" if label.startswith("pydoc") else "a longer text (--calibration pydoc)")
    required = f"{samples} {'window is' if samples == 1 else 'windows are'} required"  # as it was given
    return CalibrationError(
        f"{label} holds {number_of(windows, 'window')} of {config.seq_len} tokens "
        f"({number_of(tokens, 'token')}); {required}",
        hint="use " + ", or ".join(ways) if tokens else SOURCES_HINT,
    )
