"""How many tokens a model can process at once, and what happens beyond that.

Learned positions, and tables of sines that are made once, have one row per position: past the last row the
forward fails. Rotary positions and ALiBi are computed for any position, so a model continues past the length
it was trained for, with worse results. The number of rows is read from the table itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gptq_cli.model.text_part import text_modules

_FULL_BIAS = {"mpt": "max_seq_len"}
"""Model types that compute the ALiBi bias of all positions in the forward, so that no tensor shows their
number -> the config field that does."""


@dataclass(frozen=True, slots=True)
class Positions:
    """The largest number of tokens in a text; `fixed`: with one more the forward fails."""

    tokens: int
    fixed: bool


def positions_of(model: nn.Module, config: Any) -> Positions | None:
    """The positions of `model` (which may be on the meta device); None where nothing limits them."""
    rows = min(_tables(model), default=None)
    if rows is not None:
        return Positions(rows, fixed=True)
    text_config = config.get_text_config()
    full = _FULL_BIAS.get(getattr(text_config, "model_type", None) or "")
    named = stated_positions(text_config, full or "max_position_embeddings")
    if named is None:
        return None
    if full is not None:
        return Positions(named, fixed=True)
    return Positions(max(named, *_stretched(getattr(text_config, "rope_parameters", None))), fixed=False)


def stated_positions(text_config: Any, field: str = "max_position_embeddings") -> int | None:
    """The number of positions that the config names; None where it names none, as XLNet (-1)."""
    named = getattr(text_config, field, None)
    return named if isinstance(named, int) and not isinstance(named, bool) and named > 0 else None


def _tables(model: nn.Module) -> Iterator[int]:
    """Usable rows of every table of positions: GPT-2's `wpe`, OPT's `embed_positions`, GPT-J's buffer."""
    for name, module in text_modules(model):
        own = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in own or own == "wpe"):
            offset = getattr(module, "offset", 0)  # OPT, Bart: rows before the first position
            yield module.num_embeddings - (offset if isinstance(offset, int) else 0)
    buffers = [item for _, module in text_modules(model) for item in module.named_buffers(recurse=False)]
    for own, buffer in buffers:
        if buffer.ndim == 2 and buffer.shape[0] > 1 and buffer.is_floating_point() and "pos" in own:
            yield buffer.shape[0]


def _stretched(rope: Any) -> Iterator[int]:
    """Lengths that scaled rotary positions (YaRN, Llama 3) are meant for, after a 0."""
    yield 0
    if not isinstance(rope, Mapping):
        return
    for value in rope.values():
        if isinstance(value, Mapping):  # one dictionary for each kind of attention
            yield from _stretched(value)
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if isinstance(original, int | float) and isinstance(factor, int | float):
        yield int(original * factor)
