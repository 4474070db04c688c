"""Sources of text: what each gives, and what each refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from gptq_cli.calibration import text as module
from gptq_cli.calibration.text import find_file, read_documents
from gptq_cli.errors import CalibrationError


def texts(source: object, **options: Any) -> list[str]:
    """The documents of a source, pieces joined."""
    documents: list[str] = []
    for piece in read_documents(str(source), **options).pieces:
        if piece.opens:
            documents.append(piece.text)
        else:
            documents[-1] += piece.text
    return documents


def refused(source: object, **options: Any) -> CalibrationError:
    with pytest.raises(CalibrationError) as caught:
        texts(source, **options)
    return caught.value


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


class TestPlainText:
    def test_a_file_is_one_document(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("One.\n\nTwo, café.\n", encoding="utf-8")
        assert texts(tmp_path / "a.txt") == ["One.\n\nTwo, café.\n"]
        assert read_documents(str(tmp_path / "a.txt")).label == str(tmp_path / "a.txt")

    def test_line_ends_and_a_byte_order_mark_make_no_difference(self, tmp_path: Path) -> None:
        (tmp_path / "unix.txt").write_bytes(b"a\nb\n")
        (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
        assert texts(tmp_path / "unix.txt") == texts(tmp_path / "dos.txt") == ["a\nb\n"]

    def test_a_long_file_comes_in_pieces_cut_after_a_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 10)
        (tmp_path / "a.txt").write_text("12345\n67890\nabc\n")
        pieces = list(read_documents(str(tmp_path / "a.txt")).pieces)
        assert [(piece.text, piece.opens) for piece in pieces] == [("12345\n67890\n", True), ("abc\n", False)]

    def test_bytes_that_are_not_utf_8_are_placed(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"fine\nna\xefve\n")
        error = refused(tmp_path / "a.txt")
        assert "not UTF-8: byte 0xef at line 2, byte 7 of the file" in error.message
        assert "iconv" in str(error.hint)

    def test_plain_text_has_no_columns(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("a")
        assert "no column 'text'" in refused(f"{tmp_path / 'a.txt'}:text").message


class TestFindingTheFile:
    def test_a_file_that_exists_wins_over_a_hub_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("wikitext2").write_text("local text")
        assert texts("wikitext2") == ["local text"]

    def test_a_colon_may_be_part_of_the_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write(Path("C:\\data\\a.jsonl"), {"text": "x", "body": "y"})
        assert texts("C:\\data\\a.jsonl") == ["x"]
        assert texts("C:\\data\\a.jsonl:body") == ["y"]

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "a.txt").write_text("at home")
        assert texts("~/a.txt") == ["at home"]

    @pytest.mark.parametrize(
        "source", ["./a", "no/such.txt", "a.jsonl:body", "/x/y", "C:\\a\\b.txt", "a.parquet", "~/z", "a.json"]
    )
    def test_a_missing_path_is_never_looked_for_on_the_hub(
        self, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        error = refused(source)
        assert "does not exist" in error.message
        assert "pydoc" in str(error.hint)

    def test_a_directory_is_refused(self, tmp_path: Path) -> None:
        assert "is a directory" in refused(tmp_path).message

    def test_a_colon_without_a_column_is_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", {"text": "x"})
        assert "ends in a colon" in refused(f"{path}:").message

    def test_nothing_there_is_none(self, tmp_path: Path) -> None:
        assert find_file(str(tmp_path / "none.txt")) is None


class TestStandardInput:
    def test_it_is_one_document(self) -> None:
        assert texts("-", stdin=io.BytesIO("piped téxt\n".encode())) == ["piped téxt\n"]

    def test_closed_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.stdin", None)
        assert "standard input is closed" in refused("-").message
        closed = io.BytesIO(b"")
        closed.close()
        assert "standard input is closed" in refused("-", stdin=closed).message

    def test_a_terminal_is_an_error(self) -> None:
        class Terminal(io.BytesIO):
            def isatty(self) -> bool:
                return True

        error = refused("-", stdin=Terminal(b"typed"))
        assert "is a terminal" in error.message
        assert "| gptq" in str(error.hint)


class TestTables:
    def test_json_lines(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "a.jsonl", {"text": "one"}, {"text": None}, {"text": " "}, {"text": "two"}, "three"
        )
        assert texts(path) == ["one", "two", "three"]

    def test_json_list(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}, "three"]))
        assert texts(tmp_path / "a.json") == ["one", "two", "three"]

    def test_parquet(self, tmp_path: Path) -> None:
        table = pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "two"], "body": ["a", "b", "c"]})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert texts(tmp_path / "a.parquet") == ["one", "two"]
        assert texts(f"{tmp_path / 'a.parquet'}:body") == ["a", "b", "c"]

    def test_a_column_is_chosen_after_a_colon(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", {"text": "one", "body": "two"})
        assert texts(f"{path}:body") == ["two"]
        assert read_documents(f"{path}:body").label == f"{path}:body"

    def test_conversations_go_through_the_chat_template(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "Hi"}]})
        assert texts(path, render=lambda messages: f"<{messages[0]['role']}>{messages[0]['content']}") == [
            "<user>Hi"
        ]
        assert texts(path) == ["Hi"]

    def test_conversations_in_parquet(self, tmp_path: Path) -> None:
        rows = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]]
        pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "a.parquet")
        assert texts(tmp_path / "a.parquet") == ["Hi\n\nYes?"]

    def test_a_template_that_refuses_is_placed(self, tmp_path: Path) -> None:
        def render(messages: Any) -> str:
            raise ValueError("roles must alternate")

        path = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "Hi"}]})
        error = refused(path, render=render)
        assert "line 1" in error.message
        assert "roles must alternate" in error.message

    def test_a_long_row_is_cut_but_stays_one_document(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 4)
        path = write(tmp_path / "a.jsonl", {"text": "ab\ncdefgh"}, {"text": "x"})
        assert [piece.text for piece in read_documents(str(path)).pieces] == ["ab\n", "cdef", "gh", "x"]
        assert texts(path) == ["ab\ncdefgh", "x"]


class TestBrokenTables:
    def test_a_line_that_is_no_json_is_numbered(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n{"text": oops}\n')
        error = refused(tmp_path / "a.jsonl")
        assert "line 3 is no JSON" in error.message
        assert "oops" in error.message

    @pytest.mark.parametrize(
        ("lines", "source", "says"),
        [
            ([{"text": ""}, {"text": "  \n"}], "a.jsonl", "is empty: 2 rows and no text"),
            ([], "a.jsonl", "is empty: 0 rows"),
            ([{"text": "x", "body": ""}], "a.jsonl:body", "column 'body' of a.jsonl is empty"),
            ([{"id": 1, "body": "x"}], "a.jsonl", "no column 'text' or 'messages'; columns: id, body"),
            ([{"text": "x"}], "a.jsonl:txt", "line 1 has no column 'txt'; columns: text"),
            ([{"text": "x"}, {"text": 5}], "a.jsonl", "line 2 is a JSON number"),
            ([{"text": ["x"]}], "a.jsonl", "line 1 is a JSON list"),
            (["x"], "a.jsonl:text", "line 1 is a JSON string and has no column 'text'"),
        ],
    )
    def test_rows(
        self, lines: list[object], source: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write(Path("a.jsonl"), *lines)
        assert says in refused(source).message

    def test_a_json_file_of_another_shape(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('{"text": "x"}')
        assert "holds a JSON object; allowed: a list" in refused(tmp_path / "a.json").message
        (tmp_path / "a.json").write_text('{"text": "x"}\n{"text": "y"}\n')
        assert ".jsonl" in str(refused(tmp_path / "a.json").hint)

    def test_a_parquet_file_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
        assert "is no readable Parquet file" in refused(tmp_path / "a.parquet").message

    def test_a_parquet_column_that_is_missing(self, tmp_path: Path) -> None:
        pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
        assert "no column 'text' or 'messages'; columns: id, body" in refused(tmp_path / "a.parquet").message
        assert "no column 'txt'" in refused(f"{tmp_path / 'a.parquet'}:txt").message
