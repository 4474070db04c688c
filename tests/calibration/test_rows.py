"""Tables of text: what a row may hold, and what is refused by row."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from gptq_cli.calibration import rows
from tests.calibration.test_text import refused, texts, write


def conversation(*contents: object) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


class TestContents:
    @pytest.mark.parametrize(
        "content",
        [
            [{"type": "text", "text": "Hello"}],
            [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
            [{"type": "input_text", "text": "Hello", "annotations": []}],
            [{"text": "Hello"}],
            ["Hel", {"type": "output_text", "text": "lo"}],
        ],
    )
    def test_parts_are_joined_as_their_text(self, content: object, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", conversation(content, "Yes?"))
        assert texts(path) == ["Hello\n\nYes?"]
        seen: list[Any] = []
        texts(path, render=lambda messages: str(seen.append(messages)) + "text")
        assert [message["content"] for message in seen[0]] == ["Hello", "Yes?"]

    def test_parts_in_parquet_have_the_fields_of_the_others_as_null(self, tmp_path: Path) -> None:
        parts = [{"type": "text", "text": "Hi", "image_url": None}]
        bad = [{"type": None, "text": None, "image_url": "http://x"}]
        table = [[{"role": "user", "content": parts}], [{"role": "user", "content": bad}]]
        pyarrow.parquet.write_table(pyarrow.table({"messages": table[:1]}), tmp_path / "a.parquet")
        assert texts(tmp_path / "a.parquet") == ["Hi"]
        pyarrow.parquet.write_table(pyarrow.table({"messages": table}), tmp_path / "a.parquet")
        assert (
            "row 2: message 1, part 1 of its content is not text (image_url)"
            in refused(tmp_path / "a.parquet").message
        )

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (
                [{"type": "image_url", "image_url": {"url": "x"}}],
                "part 1 of its content is not text (image_url)",
            ),
            ([{"type": "text", "text": "a"}, {"type": "input_audio", "data": "x"}], "part 2 of its content"),
            ([{"type": "image", "text": "a caption"}], "is not text (image)"),
            ([{"type": "text", "text": None}], "is not text (text)"),
            ([{"type": "text", "text": ["a"]}], "is not text (text)"),
            ([{"image": "x.png"}], "is not text (image)"),
            ([{}], "is not text (empty)"),
            ([5], "is a JSON number"),
            ([["a"]], "is a JSON list"),
            (5, "has a JSON number as content"),
            ({"text": "a"}, "has a JSON object as content"),
            (True, "has a JSON boolean as content"),
        ],
    )
    def test_what_is_no_text_is_refused_by_row(self, content: object, says: str, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", conversation("fine"), conversation("fine", content))
        for render in (None, lambda messages: "rendered"):
            message = refused(path, render=render).message
            assert f"{path} line 2: message 2" in message
            assert says in message

    def test_a_message_that_calls_a_tool_has_no_content(self, tmp_path: Path) -> None:
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
        path = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "Hi"}, call]})
        seen: list[Any] = []
        texts(path, render=lambda messages: str(seen.append(messages)))
        assert seen[0][1] == {**call, "content": ""}
        assert texts(path) == ["Hi\n\n"]

    @pytest.mark.parametrize(
        "message", [{"content": "x"}, {"role": None, "content": "x"}, {"from": "h", "value": "x"}]
    )
    def test_a_message_without_a_role_is_refused(self, message: object, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", {"messages": [message]})
        assert "line 1: message 1 has no role" in refused(path).message

    def test_an_empty_conversation_is_blank(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", {"messages": []}, {"messages": [{"role": "user", "content": "x"}]})
        assert texts(path) == ["x"]


HALF = "cut \\ud83d here"
BAD_LINES = [
    (f'{{"text": "{HALF}"}}', "line 2 holds half a surrogate pair (\\ud83d) at character 5"),
    ('{"text": "\\ude00"}', "line 2 holds half a surrogate pair (\\ude00)"),
    (
        f'{{"messages": [{{"role": "user", "content": "{HALF}"}}]}}',
        "line 2: message 1 holds half a surrogate",
    ),
    (
        f'{{"messages": [{{"role": "user", "content": [{{"type": "text", "text": "{HALF}"}}]}}]}}',
        "line 2: message 1, part 1 of its content holds half a surrogate",
    ),
    (f'"{HALF}"', "line 2 holds half a surrogate pair"),
    ('{"text":' + "[" * 200_000 + "]" * 200_000 + "}", "line 2 is nested too deeply"),
    ('{"a":' * 100_000 + "1" + "}" * 100_000, "line 2 is nested too deeply"),
    ('{"text":' + "9" * 5000 + "}", "line 2 cannot be read: it holds a number that is too long"),
    ('{"text": "a", "n": -' + "9" * 5000 + "}", "line 2 cannot be read: it holds a number that is too long"),
    ('{"text": "a", "text": "b"}', "line 2 cannot be read: key 'text' appears twice"),
    ('{"text": NaN}', "line 2 is a JSON number"),
    ('{"text": {"a": 1}}', "line 2 is a JSON object"),
    ('{"body": "a"}', "line 2 has no column 'text' or 'messages'; columns: body"),
    ("[1, 2]", "line 2 is a JSON list"),
    ("5", "line 2 is a JSON number"),
    ('{"text": "a"', "line 2 is not valid JSON"),
    ('{"text": "a', "line 2 is not valid JSON: Unterminated string at column 10"),
    ('{"text": "a\tb"}', "line 2 is not valid JSON: Invalid control character at column 12"),
]


@pytest.mark.parametrize(("line", "says"), BAD_LINES, ids=[says[7:40] for _, says in BAD_LINES])
def test_a_bad_row_is_named(line: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    assert says in refused(tmp_path / "a.jsonl").message
    if (
        not says.startswith("line 2 is not valid JSON")
        and "nested" not in says
        and "cannot be read" not in says
    ):
        (tmp_path / "a.json").write_text(f'[{{"text": "fine"}}, {line}]', encoding="utf-8")
        assert says.replace("line 2", "item 2") in refused(tmp_path / "a.json").message


def test_a_bad_json_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * 200_000)
    assert f"{path} is nested too deeply" in refused(path).message
    path.write_text("[" + "9" * 5000 + "]")
    assert f"{path} cannot be read: it holds a number that is too long" in refused(path).message
    path.write_bytes(b'["caf\xe9"]')
    assert "is not UTF-8: byte 0xe9 at line 1" in refused(path).message


def test_a_whole_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert texts(tmp_path / "a.jsonl") == ["😀"]


def test_what_a_template_makes_is_looked_at_as_well(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", conversation("x"))
    assert "half a surrogate" in refused(path, render=lambda messages: "\ud800").message

    def deep(messages: Any) -> str:
        raise RecursionError("maximum recursion depth exceeded")

    assert "chat template refuses" in refused(path, render=deep).message


def test_long_lists_of_columns_are_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {f"column{i}": "x" for i in range(5000)})
    assert len(refused(path).message) < 1000


def test_rows_and_files_without_an_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_cli.calibration.utf8.MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(rows, "MAX_JSON_CHARACTERS", 1000)
    write(tmp_path / "a.jsonl", {"text": "x"}, {"text": "x" * 1000})
    assert "line 2 has more than 1000 bytes" in refused(tmp_path / "a.jsonl").message
    (tmp_path / "a.json").write_text(json.dumps(["x" * 1000]))
    assert "has more than 1000 characters" in refused(tmp_path / "a.json").message


class TestParquet:
    def test_text_that_is_not_utf_8_is_refused_by_row(self, tmp_path: Path) -> None:
        texts_ = [b"fine"] * 40 + [b"caf\xe9"]
        column = pyarrow.Array.from_buffers(
            pyarrow.string(), len(texts_), pyarrow.array(texts_, pyarrow.binary()).buffers()
        )
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        message = refused(tmp_path / "a.parquet").message
        assert "row 41 is not UTF-8: 0xe9 at byte 3 of its text" in message

    @pytest.mark.parametrize("cut", [4, 8, 100, -4, -12])
    def test_a_file_that_was_cut(self, cut: int, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": ["plain words"] * 100}), path)
        path.write_bytes(path.read_bytes()[:cut])
        assert "is not a readable Parquet file" in refused(path).message

    def test_a_column_of_numbers(self, tmp_path: Path) -> None:
        pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
        assert "row 1 is a JSON number" in refused(tmp_path / "a.parquet").message

    @pytest.mark.parametrize(
        ("cell", "says"),
        [
            (b"abc", "row 1 is bytes without a character encoding"),
            (datetime.date(2026, 1, 2), "row 1 is a value of type date"),
        ],
    )
    def test_a_column_that_json_does_not_have(self, cell: object, says: str, tmp_path: Path) -> None:
        pyarrow.parquet.write_table(pyarrow.table({"text": [cell]}), tmp_path / "a.parquet")
        assert says in refused(tmp_path / "a.parquet").message

    def test_another_format_under_its_name(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"\x1f\x8b\x08rest of it")
        assert "is gzip" in refused(tmp_path / "a.parquet").message
        (tmp_path / "a.parquet").write_bytes(b"")
        assert "is not a readable Parquet file" in refused(tmp_path / "a.parquet").message
