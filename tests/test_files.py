"""Files that a person names: every kind of thing that can stand at a path."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from gptq_cli.files import expanded, kind_of, open_once, reason, shown

needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")


def refused(path: Path, **options: float) -> str:
    with pytest.raises(OSError, match=r"\w") as caught:
        open_once(path, **options).close()
    return reason(caught.value)


def test_a_file_is_read_from_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert kind_of(tmp_path / "a") == "file"
    with open_once(tmp_path / "a") as stream:
        assert (stream.read(), stream.seekable()) == (b"abc", True)


def test_what_is_not_there_or_no_file_says_why(tmp_path: Path) -> None:
    assert kind_of(tmp_path / "none") is None
    assert kind_of(tmp_path) == "directory"
    assert kind_of(Path(os.devnull)) == "device"
    assert refused(tmp_path / "none") == "no such file or directory"
    assert "it is a directory; allowed: a file or a pipe" in refused(tmp_path)
    assert "it is a device; allowed: a file or a pipe" in refused(Path("/dev/zero"))


def test_names_that_no_file_system_has(tmp_path: Path) -> None:
    assert "name too long" in refused(tmp_path / ("x" * 5000))
    with pytest.raises(OSError, match="name too long"):
        kind_of(tmp_path / ("x" * 5000))
    assert "NUL character" in refused(Path("a\0b"))
    assert kind_of(Path("a\0b")) is None


@needs_fifo
def test_a_pipe_without_a_writer_is_given_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    assert kind_of(tmp_path / "p") == "pipe"
    started = time.monotonic()
    assert "nothing was written to the pipe within 0.2 s" in refused(tmp_path / "p", writer_seconds=0.2)
    assert time.monotonic() - started < 5


@needs_fifo
@pytest.mark.parametrize("silent_seconds", [0.0, 0.3])
def test_a_pipe_is_read_to_its_end(tmp_path: Path, silent_seconds: float) -> None:
    path, data = tmp_path / "p", os.urandom(300_000)
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb") as stream:
            time.sleep(silent_seconds)  # longer than the reader waits for a writer, who is there
            stream.write(data)

    writer = threading.Thread(target=write)
    writer.start()
    with open_once(path, writer_seconds=0.2 if silent_seconds else 5) as stream:
        assert (stream.seekable(), stream.read()) == (False, data)
    writer.join()


def test_a_home_that_does_not_exist_is_left_as_it_stands() -> None:
    assert expanded("~no-such-user-anywhere/x") == Path("~no-such-user-anywhere/x")
    assert expanded("~") == Path.home()


def test_a_long_path_is_shown_by_its_ends() -> None:
    assert shown("a/b") == "a/b"
    assert len(shown("x" * 5000)) < 250
    assert "5000 characters" in shown("x" * 5000)
