"""Data sets on the Hub, streamed through `datasets`, so that only the beginning of a large one is downloaded.

First the Hub is asked, once and without retries, whether the data set exists: `datasets` itself retries for
half a minute before it reports a failure. With `HF_HUB_OFFLINE=1` the local cache of `datasets` is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gptq_cli.calibration.documents import Documents, Piece, rows_to_pieces
from gptq_cli.calibration.rows import Render
from gptq_cli.calibration.utf8 import SOURCES_HINT
from gptq_cli.errors import CalibrationError
from gptq_cli.wording import first_line

OFFLINE_HINT = (
    "without a network: --calibration pydoc, or a .txt, .jsonl or .parquet file, or '-' (standard input)"
)
TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class HubSource:
    """A data set on the Hub: `id[:config[:split[:column]]]`."""

    id: str
    config: str | None = None
    split: str = "train"
    column: str | None = None

    def __str__(self) -> str:
        return ":".join((self.id, self.config or "", self.split, self.column or "")).rstrip(":")


SHORT_NAMES = {
    "wikitext2": HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": HubSource("allenai/c4", "en", "train", "text"),
}


def parse_hub_source(source: str) -> HubSource:
    """`id[:config[:split[:column]]]`, empty parts meaning their default. Raises `CalibrationError`."""
    if source in SHORT_NAMES:
        return SHORT_NAMES[source]
    id_, *rest = source.split(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", id_) or len(rest) > 3 or any("/" in part for part in rest):
        raise CalibrationError(
            f"the text is {source!r}; allowed: pydoc, an existing file, '-', wikitext2, c4, "
            "or a Hub data set ID[:config[:split[:column]]]",
            hint=OFFLINE_HINT,
        )
    config, split, column = (part or None for part in (*rest, "", "", "")[:3])
    return HubSource(id_, config, split or "train", column)


def hub_text(source: str) -> tuple[str, ...]:
    """Equal for two names of one text of the Hub, as far as names tell: `c4` and `allenai/c4:en`. Which
    column is read where none is named is known of the short names' data sets only. Raises
    `CalibrationError`."""
    wanted = parse_hub_source(source)
    short = next((one for one in SHORT_NAMES.values() if _place(one) == _place(wanted)), None)
    column = wanted.column or (short.column if short is not None else None)
    if short is not None and short.id == SHORT_NAMES["wikitext2"].id:
        column = short.column  # whichever is named: see `read_hub`
    return (*_place(wanted), column or "")


def _place(source: HubSource) -> tuple[str, str, str]:
    return source.id.lower(), source.config or "", source.split  # the Hub takes any case for an id


def read_hub(source: str, render: Render | None) -> Documents:
    """Open a data set on the Hub; its rows are read while the pieces are iterated."""
    wanted = parse_hub_source(source)
    rows = _rows(wanted, source)
    if wanted.id == SHORT_NAMES["wikitext2"].id:
        return Documents(str(wanted), (Piece(text) for text in articles(row["text"] for row in rows)))
    numbered = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    return Documents(str(wanted), rows_to_pieces(numbered, str(wanted), wanted.column, render))


def articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's rows are lines; an article begins at ` = Title = `."""
    article: list[str] = []
    for line in lines:
        if article and re.fullmatch(r" = [^=].* = \n?", line):
            yield "".join(article)
            article = []
        if line:
            article.append(line)
    if article:
        yield "".join(article)


def _rows(wanted: HubSource, source: str) -> Iterator[dict[str, Any]]:
    """Rows of the data set; every failure on the way is a `CalibrationError`."""
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise CalibrationError(
            f"{source} needs the package `datasets`: {error}", hint=SOURCES_HINT
        ) from error
    offline = bool(huggingface_hub.constants.HF_HUB_OFFLINE)
    if not offline:
        _ask_the_hub(wanted, source)
    try:
        data = datasets.load_dataset(wanted.id, wanted.config, split=wanted.split, streaming=not offline)
        yield from data
    except Exception as error:  # datasets and its back ends raise everything from OSError to KeyError
        if offline:
            raise CalibrationError(
                f"Hub data set {wanted} is not in the local cache, and HF_HUB_OFFLINE is set",
                hint=OFFLINE_HINT,
            ) from error
        raise CalibrationError(
            f"Hub data set {wanted} cannot be read: {first_line(error)}", hint=OFFLINE_HINT
        ) from error


def _ask_the_hub(wanted: HubSource, source: str) -> None:
    """Raise `CalibrationError` unless the Hub has the data set."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(wanted.id, timeout=TIMEOUT_SECONDS)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403, 404):
            raise CalibrationError(
                f"{source!r} is neither an existing file nor a Hub data set that you may read "
                f"(asked for {wanted.id!r}, HTTP {status})",
                hint=OFFLINE_HINT,
            ) from error
        raise CalibrationError(
            f"the Hub cannot serve data set {wanted.id!r} now: {first_line(error)}", hint=OFFLINE_HINT
        ) from error
    except Exception as error:  # no DNS, no route, a proxy that refuses: every transport has its own tree
        raise CalibrationError(
            f"{source!r} is not an existing file, and the Hub cannot be reached to look for the data set "
            f"{wanted.id!r}: {first_line(error)}",
            hint=OFFLINE_HINT,
        ) from error
