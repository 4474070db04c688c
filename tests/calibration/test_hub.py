"""Data sets of the hub: how they are named, and what happens without one. No test here uses a network."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from gptq_cli.calibration.hub import HubSource, articles, hub_text, parse_hub_source, read_hub
from gptq_cli.calibration.text import check_distinct
from gptq_cli.errors import CalibrationError


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("wikitext2", HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text")),
        ("c4", HubSource("allenai/c4", "en", "train", "text")),
        ("org/data", HubSource("org/data", None, "train", None)),
        ("org/data:en", HubSource("org/data", "en", "train", None)),
        ("org/data::validation", HubSource("org/data", None, "validation", None)),
        ("org/data:en:test:body", HubSource("org/data", "en", "test", "body")),
    ],
)
def test_names(source: str, meant: HubSource) -> None:
    assert parse_hub_source(source) == meant


@pytest.mark.parametrize("source", ["a/b/c", "a:b:c:d:e", "two words", ":x", "a b/c", "http://x/y"])
def test_no_name_of_a_data_set(source: str) -> None:
    with pytest.raises(CalibrationError, match="allowed: pydoc, an existing file"):
        parse_hub_source(source)


def test_wikitext_lines_become_articles() -> None:
    lines = ["", " = First = \n", " = = Part = = \n", " text \n", "", " = Second = \n", " more \n"]
    assert list(articles(lines)) == [" = First = \n = = Part = = \n text \n", " = Second = \n more \n"]


def _rows(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Let `datasets` serve `rows`, and the hub be there; the arguments it was called with come back."""
    called: dict[str, Any] = {}

    def load(name: str, config: str | None, **options: Any) -> list[dict[str, Any]]:
        called.update(options, name=name, config=config)
        return rows

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: None)
    return called


def test_a_data_set_is_streamed_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    called = _rows(monkeypatch, [{"body": "one"}, {"body": None}, {"body": "two"}])
    documents = read_hub("org/data:en:test:body", None)
    assert [piece.text for piece in documents.pieces] == ["one", "two"]
    assert called == {"name": "org/data", "config": "en", "split": "test", "streaming": True}
    assert documents.label == "org/data:en:test:body"


def test_wikitext2_is_read_by_article(monkeypatch: pytest.MonkeyPatch) -> None:
    _rows(monkeypatch, [{"text": " = A = \n"}, {"text": " x \n"}, {"text": " = B = \n"}])
    assert [piece.text for piece in read_hub("wikitext2", None).pieces] == [" = A = \n x \n", " = B = \n"]


def test_a_missing_column_lists_those_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    _rows(monkeypatch, [{"body": "one", "id": 1}])
    with pytest.raises(CalibrationError, match="columns: body, id"):
        list(read_hub("org/data", None).pieces)


def test_offline_is_said_with_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def load(*args: Any, **options: Any) -> None:
        assert options["streaming"] is False  # the cache of `datasets` is read, nothing is streamed
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(CalibrationError, match="HF_HUB_OFFLINE is set") as caught:
        list(read_hub("wikitext2", None).pieces)
    assert "--calibration pydoc" in str(caught.value.hint)


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(self: Any, name: str, timeout: float) -> None:
        raise OSError("name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", nobody)
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("the hub was asked again"))
    with pytest.raises(CalibrationError, match="the Hub cannot be reached") as caught:
        list(read_hub("wikitext2", None).pieces)
    assert "name or service not known" in caught.value.message
    assert "--calibration pydoc" in str(caught.value.hint)


def test_a_data_set_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(self: Any, name: str, timeout: float) -> None:
        answer = SimpleNamespace(status_code=404, headers={}, request=None)
        raise RepositoryNotFoundError("404", response=cast(Any, answer))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unknown)
    with pytest.raises(CalibrationError, match=r"neither an existing file nor a Hub data set.*HTTP 404"):
        list(read_hub("nosuch", None).pieces)


def test_a_failure_inside_datasets_is_ours_to_word(monkeypatch: pytest.MonkeyPatch) -> None:
    _rows(monkeypatch, [])

    def load(*args: Any, **options: Any) -> None:
        raise ValueError("BuilderConfig 'xx' not found. Available: ['en']\nmore")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(CalibrationError, match="BuilderConfig 'xx' not found"):
        list(read_hub("org/data:xx", None).pieces)


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("wikitext2", "Salesforce/wikitext:wikitext-2-raw-v1", True),
        ("wikitext2", "salesforce/wikitext:wikitext-2-raw-v1:train:text", True),
        ("c4", "allenai/c4:en", True),
        ("c4", "allenai/c4:en:train:text", True),
        ("a/b", "a/b::train", True),
        ("wikitext2", "Salesforce/wikitext:wikitext-2-raw-v1:test", False),
        ("c4", "allenai/c4:de", False),
        ("c4", "allenai/c4:en:train:url", False),
        ("a/b", "a/b:::text", False),
    ],
)
def test_two_names_of_one_text(one: str, two: str, same: bool) -> None:
    assert (hub_text(one) == hub_text(two)) == same
    if not same:
        check_distinct([one, two, "pydoc"])
        return
    with pytest.raises(CalibrationError, match="are one text; allowed: each source once"):
        check_distinct(["pydoc", one, two])


def test_what_is_no_name_is_left_to_its_reader() -> None:
    check_distinct(["a/b/c/missing.txt", "pydoc", "a/b"])
