"""The standard library as a text: clean, long enough, and split without overlap."""

from __future__ import annotations

import platform

import pytest

from gptq_cli.calibration.stdlib_text import clean, held_out, label, stdlib_documents


@pytest.fixture(scope="module")
def calibrated() -> tuple[str, ...]:
    return tuple(stdlib_documents(evaluation=False))


@pytest.fixture(scope="module")
def evaluated() -> tuple[str, ...]:
    return tuple(stdlib_documents(evaluation=True))


def _paragraphs(texts: tuple[str, ...]) -> list[str]:
    return [" ".join(part.split()) for text in texts for part in text.split("\n\n")]


def test_no_paragraph_is_in_both_parts(calibrated: tuple[str, ...], evaluated: tuple[str, ...]) -> None:
    assert not set(_paragraphs(calibrated)) & set(_paragraphs(evaluated))


def test_no_paragraph_comes_twice(calibrated: tuple[str, ...], evaluated: tuple[str, ...]) -> None:
    for texts in (calibrated, evaluated):
        paragraphs = _paragraphs(texts)
        assert len(paragraphs) == len(set(paragraphs))


def test_the_text_is_long_enough_for_the_default_calibration(
    calibrated: tuple[str, ...], evaluated: tuple[str, ...]
) -> None:
    # 128 windows of 2048 tokens at four characters a token, and 64 windows of 512 to judge on
    assert sum(map(len, calibrated)) > 128 * 2048 * 4
    assert sum(map(len, evaluated)) > 64 * 512 * 4


def test_it_is_the_same_text_every_time(evaluated: tuple[str, ...]) -> None:
    assert tuple(stdlib_documents(evaluation=True)) == evaluated


def test_the_split_is_by_name_and_the_same_on_every_machine() -> None:
    names = [f"topic {name}" for name in ("in", "nonlocal", "exceptions", "if", "while", "lambda")]
    assert [held_out(name) for name in names] == [True, True, True, False, False, False]


def test_help_topics_and_docstrings_are_both_in_it(calibrated: tuple[str, ...]) -> None:
    text = "\n".join(calibrated)
    assert "statement is used for conditional execution" in text  # help("if")
    assert "Return the most frequently occurring values" in text or "mode assumes discrete data" in text


def test_rest_marks_go_and_prose_is_unwrapped() -> None:
    text = (
        'The "if" statement\n******************\n\n'
        "The function :func:`~os.path.join` takes a ``path`` and gives back the same\n"
        "**path** with every separator put where the operating system wants it::\n\n"
        "   >>> join('a', 'b')\n   'a/b'\n\n"
        ".. note:: Raises :exc:`TypeError` now and then.\n"
    )
    assert clean(text).split("\n\n") == [
        'The "if" statement',
        "The function os.path.join takes a path and gives back the same "
        "path with every separator put where the operating system wants it:",
        ">>> join('a', 'b')\n'a/b'",
        "Raises TypeError now and then.",
    ]


@pytest.mark.parametrize(
    "code",
    [
        "def power(base, **options):\n    return base ** 2",
        'if_stmt ::= "if" assignment_expression ":" suite\n            ["else" ":" suite]',
        "* a list item\n* and another one",
        "short line\nanother short line",
    ],
)
def test_code_lists_and_grammar_are_left_alone(code: str) -> None:
    assert clean(code) == code


def test_the_label_names_the_python_release() -> None:
    assert label("pydoc") == f"pydoc (Python {platform.python_version()})"
