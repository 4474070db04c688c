"""The probe of the disk: some pieces, wherever they lie."""

from __future__ import annotations

from pathlib import Path

from gptq_cli.devices import disk
from gptq_cli.devices.disk import LEAST_BYTES, read_rate


def test_pieces_of_large_files_are_read(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file in files:
        with file.open("wb") as made:
            made.truncate(LEAST_BYTES // 3 + 1)
    found = read_rate(files)
    assert found is not None
    assert found > 0


def test_a_file_of_less_than_a_piece_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"abc")
    with large.open("wb") as made:
        made.truncate(LEAST_BYTES)
    assert read_rate([small, large]) is not None
    assert disk._read_piece(small, disk.random.Random(0)) <= 3


def test_small_and_missing_files_tell_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"abc")
    assert read_rate([small]) is None
    assert read_rate([]) is None
    assert read_rate([tmp_path / "none"]) is None
