"""`jobs.load` on tiny checkpoints: what is opened, measured, and refused before a weight is read."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptq_cli
from gptq_cli import jobs
from gptq_cli.calibration import evaluation_windows, open_tokenizer
from gptq_cli.errors import CheckpointError, ModelError, PreflightRefused
from gptq_cli.evaluation import speed as benchmark
from gptq_cli.evaluation.divergence import compare
from gptq_cli.events import Event, PhaseAdvanced, PhaseFinished, PhaseStarted, TextGenerated, Warned
from gptq_cli.jobs import evaluating, loading
from gptq_cli.load_job import LoadJob, Sampling
from gptq_cli.placement.device import CPU
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.placement.placement import DeviceBudget
from gptq_cli.results.document import document
from gptq_cli.results.load import LoadReport, VerifyReport
from tests.checkpoint.checkpoints import Recipe, dense_copy, quantize_directory, write_config
from tests.conftest import TinyFactory
from tests.e2e.commands import gptq, write_text
from tests.inference.test_load import Q, change_tensor, close_logits, logits


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(a checkpoint, the dense model of its codes)."""
    path = tmp_path_factory.mktemp("load") / "q"
    weights = quantize_directory(tiny_llama, path, Recipe(group_size=32))
    return path, dense_copy(tiny_llama, weights, torch.float32)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("text") / "text.txt"))


def opened(job: LoadJob, events: list[Event] | None = None) -> LoadReport:
    report = jobs.load(job, (events if events is not None else []).append)
    assert isinstance(report, LoadReport)
    return report


def phases(events: list[Event]) -> list[str]:
    return [event.phase for event in events if isinstance(event, PhaseStarted)]


def test_the_text_comes_in_pieces_as_events(made: tuple[Path, Any]) -> None:
    events: list[Event] = []
    report = opened(LoadJob(path=str(made[0]), prompt="The import", max_new_tokens=12), events)
    pieces = [event for event in events if isinstance(event, TextGenerated)]
    assert "".join(piece.text for piece in pieces) == report.text
    assert len(pieces) > 2
    assert pieces[-1].tokens == report.new_tokens
    assert report.prompt_tokens > 0
    begin = events.index(PhaseStarted("generate", 12))
    end = next(i for i, e in enumerate(events) if isinstance(e, PhaseFinished) and e.phase == "generate")
    assert begin < events.index(pieces[0]) < events.index(pieces[-1]) < end


def test_sampling_and_raw_reach_the_generation(
    made: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    real = evaluating.generate

    def spy(*args: Any, **options: Any) -> Any:
        asked.update(options)
        return real(*args, **options)

    monkeypatch.setattr(evaluating, "generate", spy)
    warm = Sampling(temperature=1.5, top_p=0.9, top_k=40, seed=3)
    job = LoadJob(path=str(made[0]), prompt="x", max_new_tokens=4, raw=True, sampling=warm)
    first = opened(job).text
    assert asked == {"raw": True, "sampling": warm}
    assert opened(job).text == first
    assert opened(replace(job, sampling=replace(warm, seed=4))).text != first


def test_against_the_dense_model(made: tuple[Path, Any], tiny_llama: Path, text: str) -> None:
    path, saved = made
    events: list[Event] = []
    job = LoadJob(path=str(path), evaluate=text, seq_len=32, windows=3, against=str(tiny_llama))
    report = opened(job, events)
    windows = evaluation_windows(open_tokenizer(path), text, 32, 3)
    dense = dense_copy(tiny_llama, {}, torch.float32)
    expected = compare(saved, dense, windows.input_ids)
    assert report.agreement is not None
    assert report.agreement.kl == pytest.approx(expected.kl, rel=1e-3)
    assert report.agreement.kl > 0.001
    assert report.agreement.top1 == pytest.approx(expected.top1)
    assert report.perplexity == report.agreement.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert report.agreement.dense_perplexity == pytest.approx(expected.dense_perplexity, rel=1e-4)
    assert (report.against, report.windows, report.seq_len) == (str(tiny_llama), 3, 32)
    assert report.text_source.startswith(text)
    assert phases(events) == ["open", "load", "dense", "evaluate"]
    assert PhaseAdvanced("evaluate", 3, 3) in events
    body = document(report)
    assert body["agreement"]["perplexity_gap"] == pytest.approx(  # type: ignore[index,call-overload]
        expected.perplexity_gap, rel=1e-3
    )


def test_without_a_text_the_held_out_one_is_read(
    made: tuple[Path, Any], tiny_llama: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def instead(tokenizer: Any, source: str, seq_len: int, windows: int, **options: Any) -> Any:
        asked.append(source)
        return evaluation_windows(tokenizer, text, seq_len, windows)

    monkeypatch.setattr(loading, "evaluation_windows", instead)
    opened(LoadJob(path=str(made[0]), against=str(tiny_llama), seq_len=16, windows=1))
    assert asked == ["pydoc-heldout"]


@pytest.mark.parametrize(
    ("max_kl", "max_perplexity", "failed"),
    [(1e-6, None, ["max_kl"]), (100.0, 1e9, []), (1e-6, 1.0, ["max_kl", "max_perplexity"])],
)
def test_gates(
    made: tuple[Path, Any],
    tiny_llama: Path,
    text: str,
    max_kl: float,
    max_perplexity: float | None,
    failed: list[str],
) -> None:
    report = opened(
        LoadJob(
            path=str(made[0]),
            evaluate=text,
            seq_len=16,
            windows=1,
            against=str(tiny_llama),
            max_kl=max_kl,
            max_perplexity=max_perplexity,
        )
    )
    assert [gate.name for gate in report.gates if not gate.passed] == failed
    assert report.ok is (failed == [])
    assert len(report.failures) == len(failed)
    assert document(report)["ok"] is (failed == [])


def test_perplexity_alone_has_its_gate(made: tuple[Path, Any], text: str) -> None:
    job = LoadJob(path=str(made[0]), evaluate=text, seq_len=16, windows=1, max_perplexity=1.0)
    report = opened(job)
    assert report.failures == (f"perplexity is {report.perplexity:.4g}, above --max-perplexity 1",)


def nothing_is_read(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a weight was read")


def test_a_dense_model_of_another_vocabulary_is_refused_before_a_weight_is_read(
    made: tuple[Path, Any], tiny_llama: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    config = (other / "config.json").read_text().replace('"vocab_size": 512', '"vocab_size": 256')
    (other / "config.json").write_text(config)
    tensors = load_file(other / "model.safetensors")
    cut = {n: t[:256].clone() if t.shape[0] == 512 else t for n, t in tensors.items()}
    save_file(cut, other / "model.safetensors")
    monkeypatch.setattr(loading, "load_quantized", nothing_is_read)
    with pytest.raises(CheckpointError, match="knows 512 tokens, the dense one 256"):
        jobs.load(LoadJob(path=str(made[0]), against=str(other), evaluate=text, seq_len=16))


def test_a_dense_model_of_another_depth_is_refused_before_a_weight_is_read(
    made: tuple[Path, Any], tiny: TinyFactory, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_quantized", nothing_is_read)
    with pytest.raises(CheckpointError, match="has 3 blocks, the dense one 2") as caught:
        jobs.load(LoadJob(path=str(made[0]), against=str(tiny("llama_tied")), evaluate=text, seq_len=16))
    assert caught.value.exit_code == 2
    ran = gptq("load", made[0], "--against", tiny("mistral"), "--eval", text, "--seq-len", "16", "--json")
    assert ran.code == 2
    assert "is a llama, the dense one a mistral" in ran.stdout


def zeros_of(path: Path, version: str, linears: list[str] | None = None) -> None:
    """Rewrite symmetric 4-bit zeros (of some linears) as `version` stores them."""
    word = -0x77777778 if version == "gptq_v2" else 0x77777777
    tensors = load_file(path / "model.safetensors")
    for name in tensors:
        if name.endswith(".qzeros") and (linears is None or name.removesuffix(".qzeros") in linears):
            tensors[name] = torch.full_like(tensors[name], word)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(("said", "found"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
@pytest.mark.parametrize("some", [False, True])
def test_symmetric_zeros_are_read_as_what_they_are(
    said: str, found: str, some: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    weights = quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32, version=said))
    zeros_of(tmp_path / "q", found, [Q, "lm_head"] if some else None)
    expected = logits(dense_copy(tiny_llama, weights, torch.float32))
    assert close_logits(logits(gptq_cli.load(str(tmp_path / "q"))), expected, 1e-5)
    events: list[Event] = []
    report = opened(LoadJob(path=str(tmp_path / "q")), events)
    (told,) = [event.message for event in events if isinstance(event, Warned)]
    assert told.startswith(
        f"{'1 of 21 linears stores its' if some else '21 of 21 linears store their'} zeros as in {found}"
    )
    assert f"though the config says {said}" in told
    assert report.warnings == (told,)
    assert document(report)["warnings"] == [told]
    ran = gptq("load", tmp_path / "q")
    assert (ran.code, "zeros as in" in ran.stderr) == (0, True)
    assert "zeros as in" in ran.stdout.replace("\n", " ")
    assert gptq("load", tmp_path / "q", "--verify").code == 5


def test_python_is_told_by_the_log(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    gptq_cli.load(str(tmp_path / "q"))
    assert caplog.records == []
    zeros_of(tmp_path / "q", "gptq_v2")
    gptq_cli.load(str(tmp_path / "q"))
    assert [record.name for record in caplog.records] == ["gptq_cli"]


def test_zeros_that_are_not_symmetric_though_sym_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    weights = quantize_directory(
        tiny_llama, tmp_path / "q", Recipe(group_size=32, sym=False, version="gptq_v2")
    )
    write_config(tmp_path / "q", Recipe(group_size=32, sym=True, version="gptq_v2"))
    report = opened(LoadJob(path=str(tmp_path / "q")))
    assert len(report.warnings) == 1
    assert "of 21 linears have zeros that do not fit symmetric codes" in report.warnings[0]
    expected = logits(dense_copy(tiny_llama, weights, torch.float32))
    assert close_logits(logits(gptq_cli.load(str(tmp_path / "q"))), expected, 1e-5)


@pytest.mark.parametrize("equal", [True, False])
def test_tied_tensors_that_are_stored_twice(equal: bool, tiny: TinyFactory, tmp_path: Path) -> None:
    quantize_directory(tiny("llama_tied"), tmp_path / "q", Recipe(group_size=32))
    alone = opened(LoadJob(path=str(tmp_path / "q")))
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] * (1 if equal else 2)
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "q" / "model.safetensors")
    model = gptq_cli.load(str(tmp_path / "q"))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is equal
    assert torch.equal(model.lm_head.weight, head)
    report = opened(LoadJob(path=str(tmp_path / "q")))
    assert (report.weight_bytes == alone.weight_bytes) is equal
    assert (report.warnings == ()) is equal
    assert equal or "lm_head.weight are one tensor by the config" in report.warnings[0]


def test_a_map_that_covers_the_embedding_covers_its_output_head(tiny: TinyFactory, tmp_path: Path) -> None:
    quantize_directory(tiny("llama_tied"), tmp_path / "q", Recipe(group_size=32))
    spec = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu"}
    model = gptq_cli.load(str(tmp_path / "q"), device_map=spec)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_dense_model_that_does_not_fit_beside_is_refused_before_a_weight_is_read(
    made: tuple[Path, Any], tiny_llama: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_bytes = (made[0] / "model.safetensors").stat().st_size
    dense_bytes = (tiny_llama / "model.safetensors").stat().st_size
    baseline = 450 * 2**20
    job = LoadJob(path=str(made[0]), against=str(tiny_llama), evaluate=text, seq_len=16, windows=1)
    for room, fits in ((checkpoint_bytes + 2 * dense_bytes, True), (dense_bytes + 1000, False)):
        budget = DeviceBudget(CPU, baseline + room, baseline + room)
        monkeypatch.setattr(evaluating, "present_devices", lambda budget=budget: (budget,))
        if fits:
            assert opened(job).agreement is not None
            continue
        monkeypatch.setattr(loading, "load_quantized", nothing_is_read)
        with pytest.raises(PreflightRefused) as caught:
            jobs.load(job)
        assert "memory-budget" in {finding.rule for finding in caught.value.report.findings}


def test_a_quantized_model_is_no_dense_one(
    made: tuple[Path, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_quantized", nothing_is_read)
    with pytest.raises((PreflightRefused, ModelError)) as caught:
        jobs.load(LoadJob(path=str(made[0]), against=str(made[0]), evaluate=text, seq_len=16))
    assert isinstance(caught.value, PreflightRefused)
    assert "already-quantized" in {finding.rule for finding in caught.value.report.findings}


def test_bench_times_both(
    made: tuple[Path, Any], tiny_llama: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "ROUNDS", 2)
    monkeypatch.setattr(evaluating, "NEW_TOKENS", 2)
    monkeypatch.setattr(evaluating, "PROMPT_TOKENS", 8)
    events: list[Event] = []
    alone = opened(LoadJob(path=str(made[0]), bench=True), events)
    assert alone.bench is not None
    assert alone.bench.dense_speed is None
    assert alone.bench.decode_ratio is None
    assert alone.bench.speed.prompt_tokens == 8
    assert alone.bench.memory[0][0] == "cpu"
    assert phases(events) == ["open", "load", "bench"]
    events.clear()
    job = LoadJob(
        path=str(made[0]), bench=True, against=str(tiny_llama), evaluate=text, seq_len=16, windows=1
    )
    both = opened(job, events).bench
    assert both is not None
    assert both.dense_speed is not None
    assert both.decode_ratio == pytest.approx(
        both.speed.decode.tokens_per_second / both.dense_speed.decode.tokens_per_second
    )
    assert both.weight_ratio is not None
    assert both.weight_ratio < 1
    assert both.dense_weight_bytes > both.weight_bytes == alone.weight_bytes
    assert phases(events) == ["open", "load", "bench", "dense", "evaluate", "bench"]


def test_bench_keeps_within_the_positions_of_the_model(
    made: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def instead(model: Any, **options: Any) -> Any:
        asked.append(options["prompt_tokens"])
        return benchmark.measure_speed(model, prompt_tokens=1, new_tokens=1, rounds=1)

    monkeypatch.setattr(evaluating, "measure_speed", instead)
    opened(LoadJob(path=str(made[0]), bench=True))
    assert asked == [512 - evaluating.NEW_TOKENS]


def test_verify_and_targets_open_no_model(made: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_quantized", nothing_is_read)
    events: list[Event] = []
    report = jobs.load(LoadJob(path=str(made[0]), verify=True, targets=("vllm",)), events.append)
    assert isinstance(report, VerifyReport)
    assert (report.ok, len(report.checks), report.targets[0].target) == (True, 8, "vllm")
    assert phases(events) == ["verify"]
    assert any(isinstance(event, PhaseAdvanced) for event in events)
    alone = jobs.load(LoadJob(path=str(made[0]), targets=("vllm", "transformers")))
    assert isinstance(alone, VerifyReport)
    assert [target.target for target in alone.targets] == ["vllm", "transformers"]


def test_verification_is_part_of_a_load(made: tuple[Path, Any]) -> None:
    report = opened(LoadJob(path=str(made[0]), verify=True, prompt="x", max_new_tokens=1))
    assert report.verification is not None
    assert report.verification.ok
    assert report.text is not None


def test_what_is_not_sound_is_not_opened(
    made: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made[0], tmp_path / "q")
    change_tensor(f"{Q}.qzeros", lambda t: torch.full_like(t, -0x77777778))(tmp_path / "q")
    monkeypatch.setattr(loading, "load_quantized", nothing_is_read)
    report = jobs.load(LoadJob(path=str(tmp_path / "q"), verify=True, prompt="x"))
    assert isinstance(report, VerifyReport)
    assert "all stored zeros are 8" in report.failures[0]


def test_a_reader_that_is_lost_does_not_keep_us_from_measuring(
    tiny: TinyFactory, tmp_path: Path, text: str
) -> None:
    quantize_directory(tiny("llama"), tmp_path / "q", Recipe(bits=3, group_size=32))
    job = LoadJob(path=str(tmp_path / "q"), targets=("vllm",), evaluate=text, seq_len=16, windows=1)
    report = opened(job)
    assert report.perplexity is not None
    assert report.failures == ("vllm will not take it",)


def test_compile_is_done_when_asked_for(made: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(loading, "compile_forward", compiled.append)
    assert opened(LoadJob(path=str(made[0]), compile=True)).compiled
    assert len(compiled) == 1
    assert not opened(LoadJob(path=str(made[0]))).compiled
    assert len(compiled) == 1


@pytest.mark.parametrize("kernel", ["torch", "dequantize"])
def test_the_kernel_that_was_asked_for(made: tuple[Path, Any], kernel: Any) -> None:
    report = opened(LoadJob(path=str(made[0]), dtype="bfloat16", kernel=kernel))
    reasons = {count.reason for count in report.kernels}
    assert ("requested" in reasons) is (kernel == "dequantize")


def test_the_map_of_the_job_holds_for_the_dense_model(
    made: tuple[Path, Any], tiny_llama: Path, text: str
) -> None:
    asked = DeviceMap.parse("cpu")
    job = LoadJob(
        path=str(made[0]), device_map=asked, against=str(tiny_llama), evaluate=text, seq_len=16, windows=1
    )
    assert opened(job).agreement is not None
