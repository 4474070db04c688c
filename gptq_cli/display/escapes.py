"""Text from outside, made safe for a terminal or a log: the one place where this is done.

A name in a checkpoint, a path, a message of a library may contain anything: escape sequences that write to
the clipboard or hide a line, a newline that forges a line of the log, marks that reverse text so that it
reads as something else. Each such character is shown as Python spells it (`\\x1b`, `\\n`, `\\u202e`), and
nothing is interpreted as markup or as the name of an emoji.

`escaped` does it for every text in an event or a report, before any display sees it; `one_line` for a single
text; `many_lines` for text that has lines of its own (a traceback, what a library prints, generated text).
JSON escapes for itself: `json_line`.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

MIN_WIDTH = 40
"""Columns in which every table of a result can still be wrapped without losing text."""
_SIZE = re.compile("[0-9]{1,5}")
_BIDI = "\u202a-\u202e\u2066-\u2069"
_SEPARATORS = "\u2028\u2029"
_OTHERS = f"\x7f-\x9f{_SEPARATORS}{_BIDI}\ud800-\udfff"
_CONTROLS = re.compile(f"[\x00-\x1f{_OTHERS}]")
_CONTROLS_IN_LINES = re.compile(f"[\x00-\x08\x0b-\x1f{_OTHERS}]")


_IN_ASCII = str.maketrans(
    {"█": "#", "≡": "=", "▓": "@", "▒": "*", "░": "-", "·": ".", "━": "-", "─": "-", "╸": "-"}
    | {"├": "|", "│": "|", "└": "`", "…": "~", "±": "+/-"}
)
"""What stands for the characters that bars, trees and tables are drawn with; bars keep their parts apart."""


def fit_encoding(stream: TextIO) -> None:
    """Let `stream` show every text: a character that its encoding lacks becomes one of ASCII, or ?."""
    if hasattr(stream, "reconfigure"):
        codecs.register_error("gptq-ascii", _in_ascii)
        stream.reconfigure(errors="gptq-ascii")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_IN_ASCII)
    return text.encode("ascii", errors="replace").decode("ascii"), error.end


def one_line(text: str) -> str:
    """`text` without characters that a terminal acts upon, line breaks included."""
    return _CONTROLS.sub(_spelled, text)


def many_lines(text: str) -> str:
    """`text` with its line breaks and tabs, and without any other character that a terminal acts upon."""
    return _CONTROLS_IN_LINES.sub(_spelled, text)


def _spelled(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def escaped(value: T) -> T:
    """`value` (an event, a report, a finding) with `one_line` of every text in it; itself if nothing
    changed."""
    return _escaped(value)  # type: ignore[no-any-return]


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, (list, tuple)):
        items = [_escaped(item) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else type(value)(items)
    if isinstance(value, dict):
        return {_escaped(key): _escaped(held) for key, held in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        new = {name: _escaped(old) for name, old in held.items()}
        changed = {name: item for name, item in new.items() if item is not held[name]}
        return replace(value, **changed) if changed else value
    return value


def json_line(body: object) -> str:
    """One JSON document in one line of printable ASCII, so that it survives every terminal and encoding."""
    return json.dumps(body, allow_nan=False).replace("\x7f", "\\u007f")


def console_for(stream: TextIO, least_width: int = MIN_WIDTH) -> Console:
    """A console that prints text as it is: no markup, no emoji names, no highlighting.

    A size of 0 (COLUMNS, LINES) says nothing, as with a terminal that does not know its own; what is narrower
    than `least_width` would lose whole columns of a table.
    """
    from rich.console import Console

    console = Console(file=stream, highlight=False, markup=False, emoji=False, _environ=_fitting(least_width))
    if console.width < least_width:
        console.width = least_width
    return console


def _fitting(least_width: int) -> dict[str, str]:
    """The environment, with COLUMNS and LINES as Rich can use them: only where they are a size, and wide
    enough."""
    environ = dict(os.environ)
    for key, least in (("COLUMNS", least_width), ("LINES", 1)):
        text = environ.pop(key, "")
        if _SIZE.fullmatch(text) and int(text):
            environ[key] = str(max(int(text), least))
    return environ


@contextmanager
def environment_that_fits() -> Iterator[None]:
    """`_fitting` for who makes a console of its own, as Typer does for help."""
    given, fitting = dict(os.environ), _fitting(MIN_WIDTH)
    _take_sizes(fitting)
    try:
        yield
    finally:
        _take_sizes(given)


def _take_sizes(environ: Mapping[str, str]) -> None:
    for key in ("COLUMNS", "LINES"):
        os.environ.pop(key, None)
        if key in environ:
            os.environ[key] = environ[key]
