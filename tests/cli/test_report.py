"""`gptq report`: a table, a document, a page; errors before anything is written."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_cli.cli.page_file import check_page, write_page
from gptq_cli.errors import GptqError
from gptq_cli.results.document import document
from tests.cli.conftest import Run
from tests.display.events import report, verify_report
from tests.report.pages import full_report, measured_load


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(document(full_report())))
    return path


def test_one_run_is_shown_as_it_ended(run: Run, file: Path) -> None:
    shown = run("report", str(file))
    assert (shown.code, shown.err) == (0, "")
    assert "smol-w4g64 is ready after 31.4 s" in shown.out
    assert "arc_easy" in shown.out
    assert json.loads(run("report", str(file), "--json").out) == json.loads(file.read_text())


@pytest.mark.parametrize("made", [measured_load(), verify_report(sound=True)], ids=["load", "verify"])
def test_documents_of_load_have_their_table_and_their_page(made: object, run: Run, tmp_path: Path) -> None:
    file, page = tmp_path / "load.json", tmp_path / "load.html"
    file.write_text(json.dumps(document(made)))
    assert run("report", str(file), "--out", str(page)).code == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_two_are_compared(run: Run, file: Path, tmp_path: Path) -> None:
    other, page = tmp_path / "other.json", tmp_path / "both.html"
    other.write_text(json.dumps(document(report())))
    shown = run("report", str(file), str(other), "--out", str(page))
    assert shown.code == 0
    assert "A  " in shown.out
    assert "mean loss" in shown.out
    assert "2 checkpoints side by side" in page.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_an_error_before_anything_is_read(run: Run, tmp_path: Path) -> None:
    refused = run("report", "nosuch", "--out", str(tmp_path))
    assert refused.code == 2
    assert f"out is '{tmp_path}', which is a directory" in refused.err


def test_a_link_to_a_page_that_is_not_there_yet_stays_a_link(tmp_path: Path) -> None:
    link, target = tmp_path / "link.html", tmp_path / "page.html"
    link.symlink_to(target)
    write_page(check_page("out", str(link)), "<!doctype html>")
    assert link.is_symlink()
    assert target.read_text() == "<!doctype html>"


def test_a_page_that_could_not_be_written_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty file would be taken for one."""
    page = check_page("report", str(tmp_path / "page.html"))

    def full(path: Path, *_: object, **__: object) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(GptqError, match="no space left"):
        write_page(page, "<!doctype html>")
    assert list(tmp_path.iterdir()) == []


def test_a_page_whose_place_cannot_be_looked_at_any_more_is_not_written(tmp_path: Path) -> None:
    """The work is done by then."""
    page = check_page("report", str(tmp_path / "page.html"))
    page.symlink_to(page)
    with pytest.raises(GptqError, match="was not written"):
        write_page(page, "<!doctype html>")
    assert page.is_symlink()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file/x.html", "not a directory"),
        ("none/x.html", "no such file or directory"),
        ("x" * 300, "file name too long"),
        ("a\0b", "a name cannot hold a NUL character"),
    ],
)
def test_why_a_page_cannot_be_written(run: Run, tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    refused = run("report", "nosuch", "--out", f"{tmp_path}/{name}")
    assert refused.code == 2
    assert f"which cannot be written: {reason}\n" in refused.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_is_a_document_too(run: Run, tmp_path: Path) -> None:
    failed = run("report", str(tmp_path / "nosuch"), "--json")
    assert failed.code == 2
    assert json.loads(failed.out)["error"]["message"].startswith("no such directory")


def test_it_needs_no_torch(file: Path) -> None:
    code = (
        f"import sys\nfrom gptq_cli.cli.app import main\nassert main(['report', {str(file)!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_file_that_is_no_page_is_not_written_over(run: Run, file: Path, tmp_path: Path) -> None:
    held = file.read_bytes()
    refused = run("report", str(file), "--out", str(file))
    assert refused.code == 2
    assert f"out is '{file}', a file that is not a page and would be lost" in refused.err
    assert file.read_bytes() == held
    page = tmp_path / "page.html"
    page.touch()
    assert run("report", str(file), "--out", str(page)).code == 0
    first = page.read_bytes()
    assert run("report", str(file), "--out", str(page)).code == 0
    assert page.read_bytes() == first
