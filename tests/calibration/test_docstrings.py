"""Docstrings found by scanning equal those of the `ast` module."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.util import decode_source
from pathlib import Path

import pytest

from gptq_cli.calibration.docstrings import docstrings

_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _by_ast(source: str) -> list[str]:
    def definitions(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, _DEFINITIONS):
            yield node
        for statement in getattr(node, "body", ()):
            yield from definitions(statement)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes that are none
        tree = ast.parse(source)
    texts = (ast.get_docstring(node) for node in definitions(tree) if isinstance(node, _DEFINITIONS))
    return [text for text in texts if text is not None]


@pytest.mark.filterwarnings("ignore")
def test_they_equal_those_of_ast_on_modules_of_the_standard_library() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    names = [*library.glob("*.py"), *(library / "asyncio").glob("*.py"), *(library / "email").glob("*.py")]
    compared = 0
    for path in sorted(names)[::3]:
        source = decode_source(path.read_bytes())
        expected = _by_ast(source)
        assert list(docstrings(source)) == expected, path.name
        compared += len(expected)
    assert compared > 1000


@pytest.mark.parametrize(
    "source",
    [
        '"""Module."""\n',
        "#!/usr/bin/env python3\n# a comment\n\n'one line'\nx = 1\n",
        "def f(a, b=(1, {2: ':'}), *, c: dict[str, int] = {}) -> 'X':  # why\n"
        "    # more\n\n    '''Text.'''\n",
        "class A(B[\n    int,\n], metaclass=M):\n    r'''\\d'''\n    async def f(self): \"short\"\n",
        'def f(x=")"):\n    "a \\"quoted\\" word"\n    return {"k":\n            "not this"}\n',
        'try:\n    def f():\n        """First."""\nexcept ImportError:\n    def f():\n        """Second."""\n'
        'def g():\n    """After."""\n',
        'if a:\n    x = 1\nelse:\n    class B:\n        def f():\n            """No."""\n'
        'if b:\n    def h():\n        "Yes."\n',
        'def f():\n    """Text with an example:\n\n    def g():\n        \'inner\'\n    """\n'
        'def h():\n    "x" % 1\n',
        "def f(): pass\n'not a docstring'\n",
        'def f():\n    b"bytes"\ndef g():\n    f"formatted"\n',
    ],
)
def test_they_equal_those_of_ast(source: str) -> None:
    assert list(docstrings(source)) == _by_ast(source)


def test_prose_and_what_is_not_python_do_no_harm() -> None:
    source = "for those who\nclass dismissed, they said (and left\ndef: \"no\"\n'''open"
    assert list(docstrings(source)) == []
