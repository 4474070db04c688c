"""What fewer bits cost a model, kept in the user's cache: measured once, for every budget.

A file has the digest of all that the numbers depend on in its name and inside: the model's files, the tokens,
the sets of linears, the settings of the solver. It is written beside its place and renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gptq_cli.config import QuantizeConfig
from gptq_cli.files import reason
from gptq_cli.gptq.version import MATHS_VERSION
from gptq_cli.results.bits import LOSS_BITS, TRIAL_BITS, BitLosses
from gptq_cli.user_cache import CACHE_VARIABLE, cache_directory, written_beside

VERSION = 1
"""Of the way in which losses are measured: raised when the same model would give other numbers."""
Measured = dict[tuple[str, ...], BitLosses]
"""Linears that are alike -> what fewer bits cost them."""
_NOT_MEASURED = frozenset(
    {
        "bits",
        "bits_per_weight",
        "quantize_head",
        "sweeps",
        "refit",
        "solve_for",
        "dense_share",
        "fisher_tokens",
        "tune_epochs",
    }
)
"""Fields of the configuration that the numbers do not depend on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedLosses:
    """Which numbers are asked for."""

    model: str
    """A digest of the model's files."""
    tokens: str
    """A digest of the tokens, and how they are used."""
    config: QuantizeConfig
    """As given, with a number for the group size."""
    fused: tuple[tuple[str, ...], ...]

    @property
    def key(self) -> str:
        """Digest of all that the numbers depend on."""
        settings = {
            item.name: str(getattr(self.config, item.name))
            for item in fields(self.config)
            if item.name not in _NOT_MEASURED
        }
        parts = [VERSION, MATHS_VERSION, TRIAL_BITS, self.model, self.tokens, settings, self.fused]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class BitStore:
    """`on_note` is told where something about the files is not as it should be."""

    def __init__(self, on_note: Callable[[str, str], None]) -> None:
        self._on_note = on_note
        self._known: dict[str, Measured] = {}
        """Of this process: the cache may not be there."""

    def find(self, wanted: WantedLosses) -> Measured | None:
        """The numbers, where they are there."""
        if wanted.key not in self._known and (found := self._stored(wanted)) is not None:
            self._known[wanted.key] = found
        return self._known.get(wanted.key)

    def _stored(self, wanted: WantedLosses) -> Measured | None:
        try:
            path = _path(wanted.key)
            if not path.is_file():
                return None
            held = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            why = reason(error) if isinstance(error, OSError) else "it is damaged"
            self._on_note(
                f"what fewer bits cost cannot be read from the cache: {why}", "it is measured again"
            )
            return None
        found = _read(held, wanted)
        if found is None:
            self._on_note(f"{path} is not used: it is damaged", "it is measured again")
        return found

    def keep(self, wanted: WantedLosses, measured: Measured) -> None:
        """Remember the numbers, and write them; where that is not possible, it is noted."""
        self._known[wanted.key] = measured
        values = [
            [measured[one].kl, [measured[one].losses[bits] for bits in LOSS_BITS]] for one in wanted.fused
        ]
        try:
            path = _path(wanted.key)
            text = json.dumps({"key": wanted.key, "values": values, "digest": _digest(values)})
            with written_beside(path) as beside:
                beside.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            self._on_note(
                f"what fewer bits cost is not kept: {reason(error)}",
                f"the next run measures it again; {CACHE_VARIABLE} names another directory",
            )


def _path(key: str) -> Path:
    return cache_directory() / "bits" / f"{key[:32]}.json"


def _digest(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _read(held: Any, wanted: WantedLosses) -> Measured | None:
    """The numbers of a file, None where they are damaged."""
    if not isinstance(held, dict) or held.get("key") != wanted.key:
        return None
    values = held.get("values")
    if (
        not isinstance(values, list)
        or held.get("digest") != _digest(values)
        or len(values) != len(wanted.fused)
    ):
        return None
    try:
        found = {
            names: BitLosses(kl=float(kl), losses=dict(zip(LOSS_BITS, map(float, losses), strict=True)))
            for names, (kl, losses) in zip(wanted.fused, values, strict=True)
        }
    except (TypeError, ValueError):
        return None
    numbers = (x for one in found.values() for x in (one.kl, *one.losses.values()))
    return found if all(math.isfinite(x) and x >= 0 for x in numbers) else None
