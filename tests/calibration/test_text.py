"""Sources of text: what each gives, and what each refuses."""

from __future__ import annotations

import io
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from gptq_cli.calibration import documents, utf8
from gptq_cli.calibration import text as module
from gptq_cli.calibration.text import find_file, read_documents, to_measure_on
from gptq_cli.errors import CalibrationError
from gptq_cli.files import open_once


def cut_at(monkeypatch: pytest.MonkeyPatch, characters: int) -> None:
    for place in (documents, module):
        monkeypatch.setattr(place, "PIECE_CHARACTERS", characters)


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

    @pytest.mark.parametrize(
        ("name", "content", "table"),
        [
            ("rows.csv", "text,label\nsome words,1\n", "comma-separated values"),
            ("rows.TSV", "text\tlabel\n", "tab-separated values"),
            ("rows.txt", '{"text": "a"}\n\n{"text": "b"}\n', "JSON lines"),
            ("rows", '{"text": "a"}', "JSON lines"),
            (
                "rows.txt",
                '{"text": "' + "a " * (1 << 18) + '"}\n' + '{"text": "' + "b " * (1 << 19),
                "JSON lines",
            ),
            ("rows.txt", '{"text": "a"}\nand then words\n', ""),
            ("rows.txt", "words, and words\n", ""),
            ("rows.txt", "1\n2\n", ""),
            ("rows.txt", "[" * 100_000, ""),
            ("rows.txt", '[\n  {\n    "text": "a"\n  },\n  {"text": "b"}\n]\n', "JSON"),
            ("rows", '[{"text": "a"}]', "JSON"),
            ("rows.txt", '[{"text": "' + "a " * (1 << 18) + '"},\n{"text": "' + "b " * (1 << 19), "JSON"),
            ("rows.txt", "[{name}] is a template\n", ""),
            ("rows.txt", "[{" * 100_000, ""),
            ("rows.txt", "[1, 2]\n", ""),
        ],
    )
    def test_a_table_by_its_name_or_its_look(
        self, name: str, content: str, table: str, tmp_path: Path
    ) -> None:
        """It is read as it stands; that it may not be meant so is for others to say."""
        (tmp_path / name).write_text(content)
        pieces = list(read_documents(str(tmp_path / name)).pieces)
        assert [piece.table for piece in pieces] == [table] + [""] * (len(pieces) - 1)
        assert "".join(piece.text for piece in pieces) == content
        if not name.lower().endswith(("csv", "tsv")):
            (first, *_) = read_documents("-", stdin=io.BytesIO(content.encode())).pieces
            assert first.table == table

    def test_line_ends_and_a_byte_order_mark_make_no_difference(self, tmp_path: Path) -> None:
        (tmp_path / "unix.txt").write_bytes(b"a\nb\n")
        (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
        assert texts(tmp_path / "unix.txt") == texts(tmp_path / "dos.txt") == ["a\nb\n"]

    def test_a_long_file_comes_in_pieces_cut_after_a_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut_at(monkeypatch, 10)
        (tmp_path / "a.txt").write_text("12345\n67890\nabc\n")
        pieces = list(read_documents(str(tmp_path / "a.txt")).pieces)
        assert [(piece.text, piece.opens) for piece in pieces] == [("12345\n67890\n", True), ("abc\n", False)]

    def test_bytes_that_are_not_utf_8_are_placed(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"fine\nna\xefve\n")
        error = refused(tmp_path / "a.txt")
        assert "not UTF-8: byte 0xef at line 2, byte 7 of the file" in error.message
        assert "iconv" in str(error.hint)

    @pytest.mark.parametrize("size", [1, 2, 3, 7])
    def test_steps_of_any_size_read_the_same_text(
        self, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(utf8, "CHUNK_BYTES", size)
        text = "café 😀\r\nx\ry\r\n\r\nend\r"
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert texts(tmp_path / "a.txt") == [text.replace("\r\n", "\n")]
        (tmp_path / "a.txt").write_bytes(b"fine\r\nna\xefve\n")
        assert "byte 0xef at line 2, byte 8 of the file" in refused(tmp_path / "a.txt").message
        (tmp_path / "a.txt").write_bytes(b"fine\nca" + b"\xc3")
        assert "byte 0xc3 at line 2, byte 7 of the file" in refused(tmp_path / "a.txt").message

    def test_one_long_line_is_cut_before_white_space(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut_at(monkeypatch, 10)
        text = "one two three four five six seven " * 20
        (tmp_path / "a.txt").write_text(text)
        write(tmp_path / "a.jsonl", {"text": text})
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / "a.parquet")
        for name in ("a.txt", "a.jsonl", "a.parquet"):
            pieces = [piece.text for piece in read_documents(str(tmp_path / name)).pieces]
            assert "".join(pieces) == text
            assert max(map(len, pieces)) <= 10
            assert all(piece[0] == " " and piece[-1] != " " for piece in pieces[1:-1]), name

    def test_a_line_without_white_space_is_cut_anywhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut_at(monkeypatch, 10)
        (tmp_path / "a.txt").write_text("語" * 95)
        assert [len(piece.text) for piece in read_documents(str(tmp_path / "a.txt")).pieces] == [10] * 9 + [5]

    def test_a_long_line_is_never_held_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cut_at(monkeypatch, 1000)
        monkeypatch.setattr(utf8, "CHUNK_BYTES", 100)
        stream = io.BytesIO(b"word " * 100_000)
        next(read_documents("-", stdin=stream).pieces)
        assert stream.tell() < 5000

    @pytest.mark.parametrize(
        ("head", "says", "hint"),
        [
            (b"\x1f\x8b\x08\0", "is gzip", "gzip -dk"),
            (b"\x28\xb5\x2f\xfd", "is zstd", "zstd -d"),
            (b"PK\x03\x04", "is zip", "unzip"),
            (b"BZh9", "is bzip2", "bzip2 -dk"),
            (b"\xfd7zXZ\0", "is xz", "xz -dk"),
            (b"PAR1", "is Parquet", ".parquet"),
            (b"ARROW1\0\0", "is Arrow", ".parquet"),
            (b"%PDF-1.7", "is PDF", "pdftotext"),
            ("text".encode("utf-16"), "is UTF-16", "iconv -f UTF-16"),
            ("text".encode("utf-16-le"), "byte 1 of the file is 0x00", "iconv -f UTF-16"),
        ],
    )
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "-"])
    def test_what_is_no_text_is_known_by_its_first_bytes(
        self, head: bytes, says: str, hint: str, name: str, tmp_path: Path
    ) -> None:
        (tmp_path / "a").write_bytes(head + b"and the rest of it")
        (tmp_path / "a").rename(tmp_path / name) if name != "-" else None
        stdin = io.BytesIO(head + b"and the rest of it")
        error = refused("-", stdin=stdin) if name == "-" else refused(tmp_path / name)
        assert says in error.message
        assert hint in str(error.hint)

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

    @pytest.mark.parametrize("source", ["x" * 5000, "x" * 5000 + ".jsonl", "/" + "x" * 300])
    def test_a_name_that_no_file_system_has(self, source: str) -> None:
        error = refused(source)
        assert "cannot read" in error.message
        assert len(error.message) < 400
        assert "pydoc" in str(error.hint)

    @pytest.mark.parametrize("source", ["a\0b.txt", "a\0b"])
    def test_a_name_with_a_nul_is_nothing_that_exists(self, source: str) -> None:
        assert "exist" in refused(source).message

    def test_a_device_is_refused(self) -> None:
        assert "is a device; allowed: a file or a pipe" in refused("/dev/zero").message
        assert "is a device" in refused(os.devnull).message

    @pytest.mark.parametrize("name", ["a.gz", "data/a.jsonl.zst"])
    def test_a_missing_archive_is_not_looked_for_on_the_hub(self, name: str) -> None:
        assert "does not exist" in refused(name).message

    def test_a_home_that_does_not_exist(self) -> None:
        assert "does not exist" in refused("~no-such-user-anywhere/a.txt").message

    @pytest.mark.parametrize("name", ["p", "p.jsonl"])
    def test_a_pipe_is_read_once(self, name: str, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / name)
        line = b'{"text": "from a pipe"}\n'
        writer = threading.Thread(target=lambda: (tmp_path / name).write_bytes(line))
        writer.start()
        assert texts(tmp_path / name) == ["from a pipe" if name == "p.jsonl" else line.decode()]
        writer.join()

    def test_a_pipe_that_nobody_writes_to(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(utf8, "open_once", lambda path: open_once(path, writer_seconds=0.1))
        os.mkfifo(tmp_path / "p")
        assert "nothing was written to the pipe" in refused(tmp_path / "p").message
        os.mkfifo(tmp_path / "p.parquet")
        assert "nothing was written to the pipe" in refused(tmp_path / "p.parquet").message

    def test_parquet_out_of_a_pipe_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "p.parquet")

        def write() -> None:
            with suppress(BrokenPipeError):  # who refuses it may close it first
                (tmp_path / "p.parquet").write_bytes(b"PAR1")

        writer = threading.Thread(target=write)
        writer.start()
        assert "is a pipe, and Parquet is read from its end" in refused(tmp_path / "p.parquet").message
        writer.join()

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
        cut_at(monkeypatch, 4)
        path = write(tmp_path / "a.jsonl", {"text": "ab\ncdefgh"}, {"text": "x"})
        assert [piece.text for piece in read_documents(str(path)).pieces] == ["ab\n", "cdef", "gh", "x"]
        assert texts(path) == ["ab\ncdefgh", "x"]


class TestBrokenTables:
    def test_a_line_that_is_no_json_is_numbered(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n{"text": oops}\n')
        error = refused(tmp_path / "a.jsonl")
        assert "line 3 is not valid JSON" in error.message
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

    @pytest.mark.parametrize(("name", "hint"), [("a.csv", ".jsonl"), ("A.TSV", ".jsonl"), ("a.md", "a.md")])
    def test_a_column_of_what_is_read_as_plain_text(self, name: str, hint: str, tmp_path: Path) -> None:
        """The commas and numbers of a table are no text to calibrate on: it is not told to be used whole."""
        (tmp_path / name).write_text("text,label\nwords,1\n")
        error = refused(f"{tmp_path / name}:text")
        assert "is plain text and has no column 'text'" in error.message
        assert hint in str(error.hint)
        assert (f"--calibration {tmp_path / name}" in str(error.hint)) == (name == "a.md")

    def test_a_json_file_of_another_shape(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('{"text": "x"}')
        assert "holds a JSON object; allowed: a list" in refused(tmp_path / "a.json").message
        (tmp_path / "a.json").write_text('{"text": "x"}\n{"text": "y"}\n')
        assert ".jsonl" in str(refused(tmp_path / "a.json").hint)

    def test_a_parquet_file_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
        assert "is not a readable Parquet file" in refused(tmp_path / "a.parquet").message

    def test_a_parquet_column_that_is_missing(self, tmp_path: Path) -> None:
        pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
        assert "no column 'text' or 'messages'; columns: id, body" in refused(tmp_path / "a.parquet").message
        assert "no column 'txt'" in refused(f"{tmp_path / 'a.parquet'}:txt").message


def test_a_text_to_measure_on_that_is_none_is_not_sent_to_the_text_of_calibration(tmp_path: Path) -> None:
    missing = str(tmp_path / "nope.txt")
    with pytest.raises(CalibrationError) as refused_, to_measure_on(missing):
        read_documents(missing)
    assert str(refused_.value.hint).startswith("use --eval pydoc-heldout (needs no file)")
