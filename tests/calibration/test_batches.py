"""Windows: cut, drawn, reproducible, and refused where there is too little text."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_cli.calibration import batches as module
from gptq_cli.calibration import evaluation_windows, make_batches, open_tokenizer
from gptq_cli.config import CalibrationConfig
from gptq_cli.errors import CalibrationError, ModelError

TEXT = "".join(f"Sentence number {i} says that {i} times {i} is {i * i}.\n" for i in range(400))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return open_tokenizer(tiny_llama)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return str(path)


def config(source: str, **fields: Any) -> CalibrationConfig:
    return CalibrationConfig.of(source, **({"samples": 4, "seq_len": 32} | fields))


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


class TestCutting:
    def test_evaluation_takes_the_first_windows_in_order(self, tokenizer: Any, corpus: str) -> None:
        found = evaluation_windows(tokenizer, corpus, seq_len=16, windows=5)
        assert found.input_ids.dtype == torch.int64
        assert found.input_ids.flatten().tolist() == plain_ids(tokenizer, TEXT)[: 5 * 16]
        assert found.seed is None

    def test_every_sample_is_a_stretch_of_the_text(self, tokenizer: Any, corpus: str) -> None:
        ids = torch.tensor(plain_ids(tokenizer, TEXT))
        windows = {tuple(row) for row in ids[: len(ids) // 32 * 32].view(-1, 32).tolist()}
        found = make_batches(tokenizer, config(corpus))
        assert found.input_ids.shape == (4, 32)
        assert {tuple(row) for row in found.input_ids.tolist()} <= windows
        assert (found.samples, found.seq_len, found.tokens) == (4, 32, 128)
        assert found.tokens_available == len(ids)
        assert found.windows_available == len(windows)
        assert not found.read_to_end  # 8 x 128 tokens were enough
        assert make_batches(tokenizer, config(corpus, samples=100)).read_to_end

    def test_documents_are_joined_by_the_end_token_and_nothing_else(
        self, tokenizer: Any, tmp_path: Path
    ) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(f"{json.dumps({'text': word})}\n" for word in ("one", "two", "three")))
        expected: list[int] = []
        for word in ("one", "two", "three"):
            expected += [*plain_ids(tokenizer, word), tokenizer.eos_token_id]
        expected.pop()
        found = evaluation_windows(tokenizer, str(path), seq_len=len(expected), windows=1)
        assert found.input_ids[0].tolist() == expected

    def test_pieces_of_one_document_are_not_joined_by_an_end_token(
        self, tokenizer: Any, corpus: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = make_batches(tokenizer, config(corpus, samples=1, seq_len=3000))
        for place in ("documents", "text"):
            monkeypatch.setattr(f"gptq_cli.calibration.{place}.PIECE_CHARACTERS", 200)
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 500)
        cut = make_batches(tokenizer, config(corpus, samples=1, seq_len=3000))
        assert tokenizer.eos_token_id not in cut.input_ids
        assert torch.equal(cut.input_ids, whole.input_ids)

    def test_a_begin_token_stands_before_every_window_where_texts_have_one(
        self, tiny_llama: Path, tmp_path: Path, corpus: str
    ) -> None:
        folder = shutil.copytree(tiny_llama, tmp_path / "model")
        spec = json.loads((folder / "tokenizer.json").read_text())
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        }
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        tokenizer = open_tokenizer(folder)
        found = evaluation_windows(tokenizer, corpus, seq_len=16, windows=3)
        ids = plain_ids(tokenizer, TEXT)
        assert found.input_ids[:, 0].tolist() == [tokenizer.bos_token_id] * 3
        assert found.input_ids[:, 1:].flatten().tolist() == ids[: 3 * 15]

    def test_reading_stops_when_there_is_enough(
        self, tokenizer: Any, corpus: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for reads in ("documents", "text"):
            monkeypatch.setattr(f"gptq_cli.calibration.{reads}.PIECE_CHARACTERS", 1000)
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 1000)
        found = make_batches(tokenizer, config(corpus, samples=2, seq_len=16))
        assert not found.read_to_end
        assert module.POOL * 32 <= found.tokens_available < module.POOL * 32 + 1200

    def test_nothing_is_said_about_long_sequences(
        self, tokenizer: Any, corpus: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        logger = logging.getLogger("transformers")
        monkey_propagate, logger.propagate = logger.propagate, True
        try:
            make_batches(tokenizer, config(corpus))
        finally:
            logger.propagate = monkey_propagate
        assert len(TEXT) > tokenizer.model_max_length
        assert not caplog.records


class TestChoice:
    def test_the_same_request_gives_the_same_ids(self, tokenizer: Any, corpus: str) -> None:
        first, second = (make_batches(tokenizer, config(corpus)) for _ in range(2))
        assert torch.equal(first.input_ids, second.input_ids)
        assert first.sha256 == second.sha256

    def test_another_seed_gives_other_ids(self, tokenizer: Any, corpus: str) -> None:
        hashes = {make_batches(tokenizer, config(corpus, seed=seed)).sha256 for seed in range(4)}
        assert len(hashes) == 4

    def test_the_choice_is_the_same_on_every_machine(self) -> None:
        generator = torch.Generator().manual_seed(0)
        assert module._one_of_each_stretch(100, 5, generator).tolist() == [11, 32, 51, 75, 95]

    def test_the_global_generator_is_left_alone(self, tokenizer: Any, corpus: str) -> None:
        before = torch.random.get_rng_state()
        make_batches(tokenizer, config(corpus))
        assert torch.equal(before, torch.random.get_rng_state())

    @given(samples=st.integers(1, 50), spare=st.integers(0, 500), seed=st.integers(0, 2**32))
    def test_one_window_out_of_each_stretch(self, samples: int, spare: int, seed: int) -> None:
        windows = samples + spare
        chosen = module._one_of_each_stretch(windows, samples, torch.Generator().manual_seed(seed)).tolist()
        borders = [i * windows // samples for i in range(samples + 1)]
        assert all(
            low <= value < high for low, value, high in zip(borders, chosen, borders[1:], strict=False)
        )

    def test_the_hash_is_of_the_ids(self, tokenizer: Any, corpus: str) -> None:
        found = make_batches(tokenizer, config(corpus))
        raw = b"".join(int(i).to_bytes(8, "little") for i in found.input_ids.flatten())
        assert found.sha256 == hashlib.sha256(raw).hexdigest()


class TestTooLittle:
    def test_the_error_counts_windows_and_names_two_ways_out(self, tokenizer: Any, corpus: str) -> None:
        tokens = len(plain_ids(tokenizer, TEXT))
        with pytest.raises(CalibrationError) as caught:
            make_batches(tokenizer, config(corpus, samples=64, seq_len=1024))
        holds = tokens // 1024
        assert f"holds {holds} windows of 1024 tokens ({tokens:,} tokens); 64 windows are required" in str(
            caught.value
        )
        hint = str(caught.value.hint)
        assert f"--samples {holds} --seq-len 1024" in hint
        assert "--samples 64 --seq-len 128" in hint

    def test_both_ways_out_work(self, tokenizer: Any, corpus: str) -> None:
        holds = len(plain_ids(tokenizer, TEXT)) // 1024
        assert make_batches(tokenizer, config(corpus, samples=holds, seq_len=1024)).samples == holds
        assert make_batches(tokenizer, config(corpus, samples=64, seq_len=128)).samples == 64

    def test_no_text_at_all(self, tokenizer: Any) -> None:
        with pytest.raises(CalibrationError, match="standard input holds 0 windows") as caught:
            make_batches(tokenizer, config("-"), stdin=io.BytesIO(b""))
        assert "pydoc" in str(caught.value.hint)

    def test_evaluation_takes_what_there_is(self, tokenizer: Any) -> None:
        text = "a short text about nothing in particular, told twice. " * 4
        tokens = len(plain_ids(tokenizer, text))
        found = evaluation_windows(tokenizer, "-", 16, 1000, stdin=io.BytesIO(text.encode()))
        assert found.samples == found.windows_available == tokens // 16
        with pytest.raises(
            CalibrationError, match=f"holds {tokens} tokens; at least one window of 512 is needed"
        ):
            evaluation_windows(tokenizer, "-", 512, 1, stdin=io.BytesIO(text.encode()))

    @pytest.mark.parametrize(
        ("names", "same"),
        [
            (("a.txt", "./a.txt"), True),
            (("a.txt", "link.txt*0.5"), True),
            (("pydoc", "a.txt", "{here}/a.txt"), True),
            (("rows.jsonl", "rows.jsonl:text"), True),
            (("rows.jsonl:text", "./rows.jsonl:text"), True),
            (("chat.jsonl:messages", "chat.jsonl"), True),
            (("list.json", "list.json:text"), True),
            (("rows.jsonl", "rows.jsonl:other"), False),
            (("rows.jsonl:text", "./rows.jsonl:other"), False),
            (("a.txt", "rows.jsonl", "b.txt"), False),
        ],
    )
    def test_one_text_under_two_names_is_refused(
        self,
        names: tuple[str, ...],
        same: bool,
        tokenizer: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        rows = [{"other": TEXT, "messages": TEXT, "text": TEXT} for _ in range(3)]
        Path("a.txt").write_text(TEXT)
        Path("b.txt").write_text(TEXT)
        Path("link.txt").symlink_to("a.txt")
        Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        Path("chat.jsonl").write_text(f"{json.dumps({'other': '', 'messages': TEXT})}\n")
        Path("list.json").write_text(json.dumps(rows))
        wanted = CalibrationConfig.of([n.format(here=tmp_path) for n in names], samples=4, seq_len=32)
        if not same:
            assert make_batches(tokenizer, wanted).samples == 4
            return
        one, two = (source.name for source in wanted.sources[-2:])
        with pytest.raises(CalibrationError, match="are one text; allowed: each source once") as caught:
            make_batches(tokenizer, wanted)
        assert caught.value.message.startswith(f"{one!r} and {two!r}")
        assert caught.value.hint == f"give it a larger weight instead: {one}*2"

    def test_a_text_to_measure_on_has_no_weight(self, tokenizer: Any, corpus: str, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match=r"is not a file, and --eval takes no weight") as caught:
            evaluation_windows(tokenizer, f"{corpus}*0.5", 16, 1)
        assert caught.value.hint == f"--eval {corpus}"
        starred = tmp_path / "a*2.txt"
        starred.write_text(TEXT)
        assert evaluation_windows(tokenizer, str(starred), 16, 1).samples == 1

    @pytest.mark.parametrize("source", ["no such text", "nowhere.txt", "{corpus}:", "{corpus}:text", "."])
    def test_errors_name_the_option_that_was_given(self, source: str, tokenizer: Any, corpus: str) -> None:
        named = source.format(corpus=corpus)
        for read, option in (
            (lambda: make_batches(tokenizer, config(named)), "--calibration"),
            (lambda: evaluation_windows(tokenizer, named, 16, 1), "--eval"),
        ):
            with pytest.raises(CalibrationError) as caught:
                read()
            words = f"{caught.value.message} {caught.value.hint}"
            assert [one for one in ("--calibration", "--eval") if one in words] == [option]

    @pytest.mark.parametrize("name", ["pydoc2.txt", "pydoc.txt", "pydoc-heldout.txt", "pydoc"])
    def test_a_file_of_a_name_that_begins_as_pydoc_keeps_it(
        self, name: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path(name).write_text(TEXT)
        with pytest.raises(CalibrationError) as caught:
            evaluation_windows(tokenizer, f"./{name}:text", 16, 1)
        assert caught.value.hint == f"use --eval ./{name}"


class TestTokenizers:
    def test_a_tokenizer_of_another_model_is_caught(self, tokenizer: Any, corpus: str) -> None:
        largest = int(make_batches(tokenizer, config(corpus)).input_ids.max())
        assert make_batches(tokenizer, config(corpus), vocab_size=largest + 1).samples == 4
        with pytest.raises(CalibrationError, match=f"makes token {largest}, but .* has {largest} rows"):
            make_batches(tokenizer, config(corpus), vocab_size=largest)

    def test_a_model_without_one(self, tiny_llama: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_llama, tmp_path / "model")
        for path in folder.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(ModelError, match="has no tokenizer") as caught:
            open_tokenizer(folder)
        assert "tokenizer.json" in str(caught.value.hint)

    def test_one_that_is_damaged(self, tiny_llama: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_llama, tmp_path / "model")
        (folder / "tokenizer.json").write_text('{"version": "1.0", "model":')
        with pytest.raises(ModelError, match="cannot be opened"):
            open_tokenizer(folder)

    def test_conversations_are_rendered_by_the_chat_template(self, tiny_llama: Path, tmp_path: Path) -> None:
        tokenizer = open_tokenizer(tiny_llama)
        tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"messages": [{"role": "user", "content": "tell me " * 20}]}))
        found = evaluation_windows(tokenizer, str(path), 16, 1)
        assert tokenizer.decode(found.input_ids[0]).startswith("[user] tell me")

    def test_pydoc_fills_the_default_calibration(self, tokenizer: Any) -> None:
        found = make_batches(tokenizer, CalibrationConfig())
        assert found.input_ids.shape == (128, 2048)
        assert found.source.startswith("pydoc (Python 3.")
        held = evaluation_windows(tokenizer, "pydoc-heldout", 512, 64)
        assert held.samples == 64


class TestSeveralSources:
    def test_windows_are_those_of_each_source_by_itself(self, tokenizer: Any, tmp_path: Path) -> None:
        names = [tmp_path / "one.txt", tmp_path / "other.txt"]
        for word, name in zip(("apple", "stone"), names, strict=True):
            name.write_text("".join(f"The {word} has number {i}.\n" for i in range(600)))
        sources = [f"{names[0]}*3", f"{names[1]}*1"]
        found = make_batches(tokenizer, CalibrationConfig.of(sources, samples=8, seq_len=32))
        alone = [
            make_batches(tokenizer, CalibrationConfig.of(str(name), samples=samples, seq_len=32))
            for name, samples in zip(names, (6, 2), strict=True)
        ]
        rows = [tuple(row) for row in found.input_ids.tolist()]
        expected = [tuple(row) for part in alone for row in part.input_ids.tolist()]
        assert sorted(rows) == sorted(expected)
        assert rows != expected  # mixed by their shares, not one after the other
        assert [(share.source, share.weight, share.samples, share.tokens) for share in found.shares] == [
            (str(names[0]), 3.0, 6, 192),
            (str(names[1]), 1.0, 2, 64),
        ]
        assert found.source == f"6 of {names[0]}, 2 of {names[1]}"
        again = make_batches(tokenizer, CalibrationConfig.of(sources, samples=8, seq_len=32))
        assert again.sha256 == found.sha256

    def test_the_source_that_is_too_short_is_named(self, tokenizer: Any, corpus: str, tmp_path: Path) -> None:
        short = tmp_path / "short.txt"
        short.write_text(TEXT[:400])
        with pytest.raises(CalibrationError, match=r"short\.txt holds \d+ windows") as caught:
            make_batches(tokenizer, CalibrationConfig.of([corpus, str(short)], samples=64, seq_len=32))
        assert "a smaller weight for it, or --samples" in str(caught.value.hint)
