"""The journal: what it names is on the disk, and nothing else in it counts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from gptq_cli.checkpoint.fingerprint import Difference, Fingerprint
from gptq_cli.checkpoint.journal import (
    FinishedBlock,
    Journal,
    JournalError,
    Manifest,
    Snapshot,
    _adapter,
    digest,
)
from gptq_cli.checkpoint.snapshot import read_snapshot, write_snapshot
from tests.display.events import block_report

PRINT = Fingerprint((("bits", "4"), ("file a", "3 bytes")))
FINISHED = FinishedBlock(report=block_report(0), tensors={"a.qweight": digest(b"abc")})


def journal_of(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal", Manifest(fingerprint=PRINT, total=3, starts=()))


def with_blocks(journal: Journal, count: int) -> Journal:
    for number in range(count):
        part = journal.write_block(number, FINISHED)
        journal.commit(replace(journal.manifest, blocks=(*journal.manifest.blocks, part)))
    return journal


def test_what_was_written_is_read(tmp_path: Path) -> None:
    journal = with_blocks(journal_of(tmp_path), 2)
    read = Journal.read(journal.folder)
    assert read.manifest == journal.manifest
    assert read.read_block(1) == FINISHED
    assert sorted(os.listdir(journal.folder)) == ["block-00000.json", "block-00001.json", "manifest.json"]


def test_a_schema_is_made_once_and_only_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[type] = []

    def counted(kind: type) -> TypeAdapter[object]:
        made.append(kind)
        return TypeAdapter(kind)

    monkeypatch.setattr("gptq_cli.checkpoint.journal.TypeAdapter", counted)
    _adapter.cache_clear()
    journal = with_blocks(journal_of(tmp_path), 3)
    assert made == []
    for number in range(3):
        assert Journal.read(journal.folder).read_block(number) == FINISHED
    assert made == [Manifest, FinishedBlock]


def test_numbers_that_are_not_finite_survive(tmp_path: Path) -> None:
    report = block_report(0)
    odd = replace(report, linears=(replace(report.linears[0], loss=float("inf")),))
    journal = journal_of(tmp_path)
    part = journal.write_block(0, FinishedBlock(report=odd, tensors={}))
    journal.commit(replace(journal.manifest, blocks=(part,)))
    assert Journal.read(journal.folder).read_block(0).report == odd


@pytest.mark.parametrize("at", range(0, 400, 7))
def test_every_damaged_byte_of_the_manifest_is_found(at: int, tmp_path: Path) -> None:
    path = with_blocks(journal_of(tmp_path), 1).folder / "manifest.json"
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 4
    path.write_bytes(data)
    with pytest.raises(JournalError, match="damaged"):
        Journal.read(path.parent)


@pytest.mark.parametrize("body", [b"{}", b"[" * 10_000, b'{"version": "x"}', b"nothing"])
def test_a_manifest_that_is_none(body: bytes, tmp_path: Path) -> None:
    journal = with_blocks(journal_of(tmp_path), 1)
    (journal.folder / "manifest.json").write_bytes(body + b"\n" + digest(body).encode())
    with pytest.raises(JournalError, match="not what this version writes"):
        Journal.read(journal.folder)


def test_files_that_nothing_names_are_removed(tmp_path: Path) -> None:
    journal = with_blocks(journal_of(tmp_path), 1)
    journal.write_block(1, FINISHED)  # as a run that ends before the manifest names it
    for name in ("hidden-3.safetensors", "manifest.json.new", "notes.txt"):
        (journal.folder / name).write_text("x")
    journal.tidy()
    assert sorted(os.listdir(journal.folder)) == ["block-00000.json", "manifest.json", "notes.txt"]


def test_blocks_that_are_taken_back_take_the_snapshot_after_them(tmp_path: Path) -> None:
    journal = with_blocks(journal_of(tmp_path), 3)
    part = journal.manifest.blocks[0]
    journal.manifest = replace(journal.manifest, snapshot=Snapshot(2, part))
    assert journal.without(2).snapshot == Snapshot(2, part)
    assert journal.without(1).snapshot is None
    assert len(journal.without(1).blocks) == 1


def test_a_snapshot_of_any_dtype(tmp_path: Path) -> None:
    tensors = {
        "hidden.0": torch.randn(3, 4).to(torch.bfloat16),
        "hidden.1": torch.randn(4, 3).T,
        "dense.0": torch.randn(3, 4, dtype=torch.float16),
    }
    part = write_snapshot(tmp_path / "hidden-1.safetensors", tensors.items())
    stored = read_snapshot(tmp_path, part)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name](), value) for name, value in tensors.items())
    assert part.size_bytes == (tmp_path / part.file).stat().st_size
    with pytest.raises(JournalError, match="damaged"):
        read_snapshot(tmp_path, replace(part, digest="0" * 32))


def test_differences_of_fingerprints() -> None:
    now = Fingerprint((("bits", "8"), ("file b", "3 bytes")))
    assert PRINT.differences(PRINT) == ()
    assert PRINT.differences(now) == (
        Difference("bits", "4", "8"),
        Difference("file a", "3 bytes", ""),
        Difference("file b", "", "3 bytes"),
    )
    assert [str(one) for one in PRINT.differences(now)][1:] == [
        "file a (3 bytes, now absent)",
        "file b (absent, now 3 bytes)",
    ]
