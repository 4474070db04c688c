from __future__ import annotations

from gptq_cli.wording import and_others, first_line, names_text


def test_a_long_list_is_cut_and_says_so() -> None:
    assert names_text("abc") == "a, b, c"
    assert names_text(range(8)) == "0, 1, 2, 3, 4, 5 and 2 more"
    assert names_text(["a", "b"], 1) == "a and 1 more"
    assert names_text([]) == ""


def test_what_follows_the_first() -> None:
    assert and_others(["a"]) == ""
    assert and_others([]) == ""
    assert and_others(["a", "b", "c"]) == " (and 2 more)"
    assert and_others(["a", "b"], "problems") == " (and 1 more problems)"


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError(" \n")) == "ValueError"
