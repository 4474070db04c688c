"""A model writes text, many stretches side by side: one token of each at a time, with the model's own cache.

A stretch is a row of the batch. Each row is at a place of its own in its script: tokens that are given (the
request, through the template; what the template puts after an answer) are put in as they stand, the others
are sampled. All rows have the same length at every moment, so there is no padding, no mask and no position to
correct: any architecture that goes on from a cache can be used. When an answer ends, the row's next request
follows, and so on until the row is full. A row holds whole turns: where nothing fits after an answer, the
answer goes on, and at the end of the row it is closed.

A window of more than `STRETCH` tokens is made of several rows: the cost of a token grows with what stands
before it, and what stands before an answer are other conversations.

Temperatures are mixed, because a text of one temperature is either dull or wild. Tokens are drawn on the CPU
in float64 from the most likely ones by a generator of the batch's own: the same logits give the same text on
every machine, and a text that was interrupted goes on as it would have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptq_cli.calibration.text_form import TextForm
from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.errors import CalibrationError, NonFinite
from gptq_cli.model.running import cache_name, input_device, matmul_scope_of
from gptq_cli.wording import first_line

TEMPERATURES = (0.6, 0.8, 1.0, 1.2)
TOP_K = 256
MIN_P = 0.02
"""A token with less than this part of the most likely one's probability is not drawn."""
STRETCH = 512
"""Tokens that are written in one go; also the longest answer."""
MIN_ANSWER = 8
"""Tokens that an answer should have room for, or another request is looked for."""
_PROBE_TOKENS = 6
_MAX_DIFFERENCE = 0.15
"""Of the logits with the cache from those without, over their spread; bfloat16 makes about 0.01."""

OnStep = Callable[[int], None]
"""Called with the tokens that one step wrote, in all rows."""


def cache_to_write_with(model: Any) -> str:
    """What the model calls its cache. Raises `CalibrationError` where it has none, or does not write text."""
    name = cache_name(model)
    if name is None or not model.can_generate():
        raise CalibrationError(
            f"{type(model).__name__} cannot write text"
            + ("" if name else ": its forward takes no cache, and without one it would take hours"),
            hint="calibrate on a text instead: --calibration pydoc, or a file",
        )
    return name


def write_rows(
    model: Any,
    form: TextForm,
    numbers: Sequence[int],
    of: int,
    length: int,
    seed: int,
    on_step: OnStep = lambda tokens: None,
) -> tuple[Tensor, Tensor]:
    """The rows with these numbers, out of `of`: (rows, length) int64 ids, and where they are the model's own.

    Raises `NonFinite` where a logit is not finite.
    """
    rows = [_Row(form, number, of, length) for number in numbers]
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    own = torch.zeros(len(rows), length, dtype=torch.bool)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + numbers[0]) % 2**63)
    decode = _Decoder(model)
    sampled: list[int] = [0] * len(rows)
    for place in range(length):
        steps = [row.advance(token) for row, token in zip(rows, sampled, strict=True)]
        ids[:, place] = torch.tensor([token for token, _ in steps])
        own[:, place] = torch.tensor([mine for _, mine in steps])
        if place + 1 < length:
            logits = decode(ids[:, place : place + 1])
            sampled = _sample(logits, form, rows, generator)
        on_step(len(rows))
    return ids, own


class _Row:
    """A stretch being written: what is given next, or else how the answer may go on."""

    def __init__(self, form: TextForm, number: int, of: int, length: int) -> None:
        self._form, self._number, self._of = form, number, of
        self._given: deque[int] = deque()
        self._turn, self._last, self._room = 0, -1, length
        self._begin(self._next(length) or min(form.beginnings, key=len))

    @property
    def temperature(self) -> float:
        """Of the answer: the next answer of the row, and that of the next row, have another."""
        return TEMPERATURES[(self._number + self._turn) % len(TEMPERATURES)]

    @property
    def may_end(self) -> bool:
        """Whether something else fits after an answer that ends with the next token."""
        return self._next(self._room - max(1, len(self._form.closing))) is not None

    def advance(self, sampled: int) -> tuple[int, bool]:
        """The next token of the row, and whether the model wrote it."""
        form = self._form
        own = not self._given
        if own and self._room <= len(form.closing):  # there is just room to close the answer
            self._given.extend(form.closing[len(form.closing) - self._room :])
            own = False
        self._last = sampled if own else self._given.popleft()
        self._room -= 1
        if own and sampled in form.ends:
            after = form.closing[1:] if form.closing[:1] == (sampled,) else ()
            following = self._next(self._room - len(after))
            self._given.extend(after)
            if following is not None:
                self._begin(following)
        return self._last, own

    def _next(self, room: int) -> tuple[int, ...] | None:
        """The next beginning that leaves room for an answer; None where none does."""
        beginnings = self._form.beginnings
        conversation = self._number + self._turn * self._of
        first = conversation + conversation // len(beginnings)  # another order in each pass
        for more in range(len(beginnings)):
            tokens = beginnings[(first + more) % len(beginnings)]
            if len(tokens) + MIN_ANSWER <= room:
                return tokens
        return None

    def _begin(self, tokens: tuple[int, ...]) -> None:
        last = self._given[-1] if self._given else self._last
        doubled = len(tokens) > 1 and tokens[0] == last  # one token ends a document and begins the next
        self._given.extend(tokens[1:] if doubled else tokens)
        self._turn += 1


class _Decoder:
    """The model, one token of each row at a time."""

    def __init__(self, model: Any) -> None:
        self._model, self._name = model, cache_to_write_with(model)
        self._device = input_device(model)
        self._cache: Any = None

    def __call__(self, tokens: Tensor) -> Tensor:  # (rows, 1) -> (rows, vocabulary)
        kept = {} if self._cache is None else {self._name: self._cache}
        with torch.inference_mode(), matmul_scope_of(self._model):
            out = self._model(input_ids=tokens.to(self._device), use_cache=True, **kept)
        self._cache = getattr(out, self._name, None)
        if self._cache is None:
            raise CalibrationError(
                f"{type(self._model).__name__} returns no cache to go on from, so it cannot write text",
                hint="calibrate on a text instead: --calibration pydoc, or a file",
            )
        logits = out.logits[:, -1]
        assert isinstance(logits, Tensor)
        return logits


def check_decoding(model: Any, form: TextForm) -> None:
    """Raise `CalibrationError` where the model cannot go on from its cache, or computes something else with
    it than without."""
    varied = max(form.beginnings, key=lambda tokens: len(set(tokens)))
    ids = torch.tensor([(varied * _PROBE_TOKENS)[-_PROBE_TOKENS:]])
    try:
        with torch.inference_mode(), matmul_scope_of(model):
            whole = model(input_ids=ids.to(input_device(model)), use_cache=False).logits[0].double().cpu()
        decode = _Decoder(model)
        parts = torch.cat([decode(ids[:, [place]]) for place in range(_PROBE_TOKENS)]).double().cpu()
    except (CalibrationError, MemoryError):
        raise
    except Exception as error:  # a model's forward raises anything
        if is_out_of_memory(error):
            raise
        raise CalibrationError(
            f"{type(model).__name__} cannot be run one token after another: {first_line(error)}",
            hint="calibrate on a text instead: --calibration pydoc, or a file",
        ) from error
    whole, parts = (part[1:] - part[1:].mean(-1, keepdim=True) for part in (whole, parts))
    difference = float((parts - whole).square().mean().sqrt() / whole.square().mean().sqrt())
    if not difference <= _MAX_DIFFERENCE:
        raise CalibrationError(
            f"{type(model).__name__} computes something else with its cache than without: its logits differ "
            f"by {difference:.0%} of their spread, so what it would write is not its own text",
            hint="calibrate on a text instead: --calibration pydoc, or a file",
        )


@torch.inference_mode()
def _sample(logits: Tensor, form: TextForm, rows: Sequence[_Row], generator: torch.Generator) -> list[int]:
    """One token for each row of (rows, vocabulary) logits."""
    logits = logits[:, : form.vocabulary].to(torch.float32, copy=True)
    if form.forbidden:
        logits[:, list(form.forbidden)] = -torch.inf
    closed = [index for index, row in enumerate(rows) if not row.may_end]
    if closed and form.ends:
        logits[torch.tensor(closed)[:, None], torch.tensor(sorted(form.ends))[None]] = -torch.inf
    best, tokens = (part.cpu() for part in logits.topk(min(TOP_K, logits.shape[1])))
    temperatures = torch.tensor([row.temperature for row in rows], dtype=torch.float64)
    p = (best.double() / temperatures[:, None]).softmax(-1)  # falling along each row
    if not bool(torch.isfinite(p).all()):
        raise NonFinite(
            "the model's output is not finite while it writes its calibration text",
            hint="float16 may overflow: try --dtype bfloat16",
        )
    p[p < MIN_P * p[:, :1]] = 0
    sums = p.cumsum(-1)
    drawn = torch.rand(len(p), 1, generator=generator, dtype=torch.float64) * sums[:, -1:]
    index = (sums <= drawn).sum(-1, keepdim=True).clamp(max=sums.shape[1] - 1)
    return [int(token) for token in tokens.gather(1, index).flatten()]
