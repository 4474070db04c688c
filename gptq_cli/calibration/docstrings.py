"""The docstrings of Python source, found by scanning it.

`ast.parse` builds a tree of every expression to find them: five seconds for the standard library, most of a
short run. A docstring is the first thing below a `def` or a `class`, so it is enough to find those lines,
walk over what is in their brackets, and look at what follows. On the standard library the result equals that
of `ast.get_docstring` (`tests/calibration/test_docstrings.py`); on other sources it may differ in two cases,
which do no harm to a text: a docstring that is glued from several literals is left out, and one in a string
that itself holds Python code is taken for real.

As with `ast`, definitions below `else`, `elif`, `except` and `finally` are left out: they are the second
version of something.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator

_HEADER = re.compile(
    r"\n([ \t]*)(?:(?:async[ \t]+)?(def|class)[ \t]|(else|elif|except|finally)\b|(?:if|for|while|with|try)\b)"
)
_SIMPLE_HEADER = re.compile(r"""\w+(?:\([^()\n:'"#{}]*\))?:""")
_IN_HEADER = re.compile(r"""[()\[\]{}:\n]|#[^\n]*|\\\n|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*\"""")
_FIRST = re.compile(r"""(?:[ \t]*(?:#[^\n]*)?\n)*[ \t]*([rRuU]?)(\"""|'''|"|')""")
_AFTER = re.compile(r"[ \t]*(?:#[^\n]*)?(?:\n|;|\Z)")
_ENDS = {
    quote: re.compile(rf"(?:[^\\{quote[0]}]|\\.|{quote[0]}(?!{quote[0] * 2}))*?{quote}", re.DOTALL)
    for quote in ('"""', "'''")
} | {quote: re.compile(rf"(?:[^\\\n{quote}]|\\.)*{quote}", re.DOTALL) for quote in ("'", '"')}


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module, its classes and functions in the order of the source, without common
    indentation."""
    found = _docstring(source, 0)
    place = 0
    if found is not None:
        text, place = found
        yield text
    source = f"\n{source}" if place == 0 else source  # so that every line begins after a newline
    enclosing: list[tuple[int, bool]] = []  # indentation, and whether it is a second version
    while (header := _HEADER.search(source, place)) is not None:
        indentation = len(header[1].expandtabs())
        while enclosing and enclosing[-1][0] >= indentation:
            enclosing.pop()
        enclosing.append((indentation, header[3] is not None))
        place = header.end()
        if header[2] is None:
            continue
        place = _body(source, place)
        found = _docstring(source, place)
        if found is not None:
            text, place = found
            if not any(second for _, second in enclosing):
                yield text


def _body(source: str, place: int) -> int:
    """Where the header that goes on at `place` has its colon: the position after it."""
    if (simple := _SIMPLE_HEADER.match(source, place)) is not None:
        return simple.end()
    depth = 0
    for token in _IN_HEADER.finditer(source, place):
        match token[0]:
            case "(" | "[" | "{":
                depth += 1
            case ")" | "]" | "}":
                depth -= 1
            case ":" if depth == 0:
                return token.end()
            case "\n" if depth == 0:
                return place  # no header: a line of prose
    return place


def _docstring(source: str, place: int) -> tuple[str, int] | None:
    """The string that is the first statement at `place`, and the position after it."""
    first = _FIRST.match(source, place)
    if first is None:
        return None
    end = _ENDS[first[2]].match(source, first.end())
    if end is None or _AFTER.match(source, end.end()) is None:
        return None
    literal = source[first.start(1) : end.end()]
    try:
        text = ast.literal_eval(literal) if "\\" in literal else end[0][: -len(first[2])]
    except (SyntaxError, ValueError):
        return None
    return inspect.cleandoc(text), end.end()
