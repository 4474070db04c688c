"""What a model wrote: kept batch by batch, found again, never trusted blindly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_cli.calibration import make_batches, open_tokenizer, own_text
from gptq_cli.calibration.batches import own_windows
from gptq_cli.calibration.own_text import OwnText, TextStore, Wanted, rows_at_once
from gptq_cli.config import CalibrationConfig
from gptq_cli.errors import CalibrationError
from tests.tiny import tiny_model

WANTED = Wanted(model="a", samples=6, seq_len=40, seed=0, held_out=False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(own_text, "MAX_ROWS", 2)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama").eval()


@pytest.fixture
def write(model: Any, tiny_llama: Path) -> Callable[..., OwnText]:
    tokenizer = open_tokenizer(tiny_llama)

    def write(wanted: Wanted = WANTED, store: TextStore | None = None, **options: Any) -> OwnText:
        return (store or TextStore()).write(wanted, model, tokenizer, **options)

    return write


def files(cache: Path) -> list[Path]:
    return sorted((cache / "text").rglob("*"))[1:]


def test_it_is_kept_and_found(cache: Path, write: Callable[..., OwnText]) -> None:
    assert TextStore().find(WANTED) is None
    text = write()
    assert text.input_ids.shape == text.answers.shape == (6, 40)
    assert (text.input_ids.dtype, text.answers.dtype) == (torch.int64, torch.bool)
    assert [path.name for path in files(cache)] == [f"rows-{n:06}.safetensors" for n in (0, 2, 4)]
    found = TextStore().find(WANTED)
    assert found is not None
    assert torch.equal(found.input_ids, text.input_ids)
    assert torch.equal(found.answers, text.answers)


def test_an_interrupted_text_goes_on_and_is_the_same(cache: Path, write: Callable[..., OwnText]) -> None:
    whole = write()
    for path in files(cache):
        path.unlink()
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done > 3 * 40:
            raise KeyboardInterrupt

    store = TextStore()
    with pytest.raises(KeyboardInterrupt):
        write(store=store, on_tokens=stop)
    assert store.written_rows(WANTED) == TextStore().written_rows(WANTED) == 2
    steps: list[tuple[int, int]] = []
    again = write(on_tokens=lambda done, total: steps.append((done, total)))
    assert torch.equal(again.input_ids, whole.input_ids)
    assert steps[0] == (82, 240)
    assert steps[-1] == (240, 240)


@pytest.mark.parametrize(
    "change",
    [{"model": "b"}, {"samples": 7}, {"seq_len": 41}, {"seed": 1}, {"held_out": True}],
    ids=lambda change: next(iter(change)),
)
def test_another_text_has_another_key(change: dict[str, Any], write: Callable[..., OwnText]) -> None:
    write()
    assert TextStore().find(replace(WANTED, **change)) is None


def test_another_page_or_way_of_writing_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {WANTED.key}
    monkeypatch.setattr(own_text, "VERSION", 99)
    keys.add(WANTED.key)
    monkeypatch.setattr(own_text, "page_digest", lambda: "other")
    keys.add(WANTED.key)
    assert len(keys) == 3


def damage(path: Path) -> None:
    tensors = load_file(path)
    tensors["ids"][0, 3] += 1
    save_file(tensors, path, metadata={"text": f"{WANTED.key} {'0' * 64}"})


def rename(path: Path) -> None:
    path.write_bytes(path.with_name("rows-000000.safetensors").read_bytes())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def other_shape(path: Path) -> None:
    save_file({"ids": torch.zeros(3, dtype=torch.int32), "own": torch.zeros(3, dtype=torch.uint8)}, path)


def other_names(path: Path) -> None:
    save_file({"x": torch.zeros(3)}, path)


@pytest.mark.parametrize("spoil", [damage, cut, other_shape, other_names, lambda path: path.write_bytes(b"")])
def test_a_file_that_does_not_fit_is_named_and_written_again(
    spoil: Callable[[Path], None], cache: Path, write: Callable[..., OwnText]
) -> None:
    whole = write()
    spoil(files(cache)[1])
    notes: list[str] = []
    store = TextStore(lambda message, hint: notes.append(message))
    assert store.written_rows(WANTED) == 2
    assert store.find(WANTED) is None
    assert len(notes) == 1
    assert "rows-000002.safetensors is not used" in notes[0]
    assert torch.equal(write(store=store).input_ids, whole.input_ids)
    assert TextStore().find(WANTED) is not None


def test_a_file_of_another_text_is_not_used(cache: Path, write: Callable[..., OwnText]) -> None:
    write()
    other = replace(WANTED, seed=3)
    folder = cache / "text" / other.key[:32]
    kept = files(cache)[0].read_bytes()
    folder.mkdir()
    (folder / "rows-000000.safetensors").write_bytes(kept)
    notes: list[str] = []
    assert TextStore(lambda message, hint: notes.append(message)).find(other) is None
    assert "belongs to another text" in notes[0]


def test_a_cache_that_cannot_be_written_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., OwnText]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTQ_CACHE", str(tmp_path / "file"))
    notes: list[str] = []
    store = TextStore(lambda message, hint: notes.append(f"{message}; {hint}"))
    text = write(store=store)
    assert "the text is not kept in" in notes[0]
    assert "GPTQ_CACHE" in notes[0]
    found = store.find(WANTED)  # for this run it is there
    assert found is not None
    assert torch.equal(found.input_ids, text.input_ids)


def test_nothing_is_left_beside_the_files(cache: Path, write: Callable[..., OwnText]) -> None:
    write()
    assert not [path for path in cache.rglob("*") if path.name.startswith(".")]


def test_long_windows_are_written_in_stretches(
    monkeypatch: pytest.MonkeyPatch, write: Callable[..., OwnText], model: Any
) -> None:
    monkeypatch.setattr(own_text, "STRETCH", 32)
    wanted = replace(WANTED, samples=2, seq_len=70)
    assert (wanted.rows_of_window, wanted.rows, wanted.row_tokens, wanted.tokens) == (3, 6, 24, 144)
    text = write(wanted)
    assert text.input_ids.shape == (2, 70)
    begins = text.input_ids[:, [0, 24, 48]]
    assert (begins == model.config.bos_token_id).all()


def test_fewer_rows_where_a_device_runs_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, write: Callable[..., OwnText]
) -> None:
    real, sizes = own_text.write_rows, []

    def tight(model: Any, form: Any, numbers: range, *words: Any) -> Any:
        sizes.append(len(numbers))
        if len(numbers) > 1:
            raise torch.OutOfMemoryError("no memory")
        return real(model, form, numbers, *words)

    monkeypatch.setattr(own_text, "write_rows", tight)
    assert write().input_ids.shape == (6, 40)
    assert sizes == [2, 1, 1, 1, 1, 1, 1]


def test_how_many_rows_at_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "MAX_ROWS", 64)
    assert rows_at_once(model, 40, "cpu") == 64
    assert rows_at_once(model, 1 << 30, "cpu") == 1
    assert rows_at_once(model, 8192, "cuda") >= rows_at_once(model, 8192, "cpu")


class TestBatches:
    def test_what_the_model_wrote_is_a_source(self, write: Callable[..., OwnText], tiny_llama: Path) -> None:
        own, tokenizer = write(), open_tokenizer(tiny_llama)
        alone = make_batches(tokenizer, CalibrationConfig.of("self", samples=6, seq_len=40), own=own)
        assert torch.equal(alone.input_ids, own.input_ids)
        assert (alone.source, alone.shares[0].tokens) == ("self", 240)
        mixed = make_batches(
            tokenizer, CalibrationConfig.of(["self*3", "pydoc"], samples=8, seq_len=40), own=own
        )
        assert [(share.source[:5], share.samples) for share in mixed.shares] == [("self", 6), ("pydoc", 2)]
        rows = {tuple(row) for row in mixed.input_ids.tolist()}
        assert {tuple(row) for row in own.input_ids.tolist()} <= rows

    def test_without_it_there_are_no_windows(self, tiny_llama: Path) -> None:
        with pytest.raises(CalibrationError, match="it has not written yet"):
            make_batches(open_tokenizer(tiny_llama), CalibrationConfig.of("self", samples=6, seq_len=40))

    def test_windows_to_measure_on_need_an_answer(self) -> None:
        nothing = OwnText(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.bool))
        with pytest.raises(CalibrationError, match="no room for an answer"):
            own_windows(nothing)


def test_a_cache_without_room_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., OwnText]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTQ_CACHE", str(tmp_path / "file"))
    notes: list[str] = []
    write(store=TextStore(lambda message, hint: notes.append(message)))
    assert len(notes) == 1  # of three files


@pytest.mark.parametrize("named", ["~nobody-of-this-name/texts", None], ids=["a user's", "none"])
def test_a_home_that_is_not_known_is_a_note(
    named: str | None, monkeypatch: pytest.MonkeyPatch, write: Callable[..., OwnText]
) -> None:
    for name in ("GPTQ_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if named is not None:
        monkeypatch.setenv("GPTQ_CACHE", named)
    monkeypatch.setattr("os.path.expanduser", str)  # what it does for a user without an entry
    notes: list[str] = []
    text = write(store=TextStore(lambda message, hint: notes.append(f"{message}; {hint}")))
    assert text.input_ids.shape == (6, 40)
    read, kept = notes
    unknown = f"the home directory of {named or '~/.cache'} is not known"
    assert read.startswith(f"kept text cannot be read: {unknown}")
    assert kept.startswith(f"the text is not kept: {unknown}")
    assert "GPTQ_CACHE names another directory" in kept


def test_a_file_with_more_rows_than_are_wanted_is_not_used(
    cache: Path, write: Callable[..., OwnText]
) -> None:
    whole = write()
    first = files(cache)[0]
    tensors = {name: torch.cat([held] * 4) for name, held in load_file(first).items()}
    save_file(tensors, first, metadata={"text": f"{WANTED.key} {own_text._digest(tensors)}"})
    notes: list[str] = []
    assert TextStore(lambda message, hint: notes.append(message)).find(WANTED) is None
    assert "its size does not fit" in notes[0]
    assert torch.equal(write().input_ids, whole.input_ids)


def test_an_interrupted_write_leaves_nothing_beside(
    cache: Path, write: Callable[..., OwnText], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(source: Path, target: Path) -> None:
        assert source.is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("gptq_cli.user_cache.os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert not [path for path in cache.rglob("*") if path.is_file()]
