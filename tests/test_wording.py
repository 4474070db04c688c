from __future__ import annotations

from gptq_cli.wording import all_of, and_others, as_json, first_line, names_text, number_of


def test_a_long_list_is_cut_and_says_so() -> None:
    assert names_text("abc") == "a, b, c"
    assert names_text(range(8)) == "0, 1, 2, 3, 4, 5 and 2 more"
    assert names_text(["a", "b"], 1) == "a and 1 more"
    assert names_text([]) == ""


def test_what_follows_the_first() -> None:
    assert and_others(["a"]) == ""
    assert and_others([]) == ""
    assert and_others(["a", "b", "c"]) == " (and 2 more)"
    assert and_others(["a", "b"], "problem") == " (and 1 more problem)"
    assert and_others(["a", "b", "c"], "problem") == " (and 2 more problems)"


def test_one_is_not_many() -> None:
    assert [number_of(n, "block") for n in (0, 1, 2048)] == ["0 blocks", "1 block", "2,048 blocks"]
    assert [number_of(n, "process") for n in (1, 2)] == ["1 process", "2 processes"]
    assert number_of(1, "linear", "stays", "stay") == "1 linear stays"
    assert number_of(2, "linear", "stays", "stay") == "2 linears stay"
    assert (all_of(1, "block"), all_of(12, "block", "is", "are")) == ("the one block", "all 12 blocks are")


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError("wrong:\n  this")) == "wrong: this"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError(" \n")) == "ValueError"


def test_a_value_of_a_json_file() -> None:
    assert [as_json(value) for value in (True, None, 4.0, "4", [None])] == [
        "true",
        "null",
        "4.0",
        "'4'",
        "[null]",
    ]
    assert as_json("a" * 200, 10) == "'aaaaaaaa…"
