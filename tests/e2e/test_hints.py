"""Every hint that can be pasted is followed, dry: what it is the hint of is gone, and nothing rejects it.

A case is a command line that makes a rule speak. Its hints are taken apart as `Finding.hint` says: options up
to a remark in parentheses, choices after `; or `. Each choice is appended to the command line, where the last
option of a name wins, and the command is run again.
"""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptq_cli.cli.app import main
from gptq_cli.findings import Finding, PreflightReport
from gptq_cli.jobs import checking, inspecting
from gptq_cli.placement.device import Device
from gptq_cli.planning.cases import Capability, JobCase
from gptq_cli.preflight.registry import RULES
from gptq_cli.preflight.rules.quantization import bfloat16_support
from tests.fabricated import fabricate
from tests.preflight.shapes import SMALL_WORK, llama

LLAMA: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
DEEP = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}
MODELS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "plain": (LLAMA, torch.bfloat16),
    "tied": (LLAMA | {"tie_word_embeddings": True}, torch.bfloat16),
    "smol": (LLAMA | SMOL | {"num_hidden_layers": 2}, torch.bfloat16),
    "odd": (
        LLAMA | {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 4,
                 "num_key_value_heads": 4, "num_hidden_layers": 2},
        torch.bfloat16,
    ),
    "half": (LLAMA | {"num_hidden_layers": 2}, torch.float16),
    "deep": (LLAMA | DEEP | {"num_hidden_layers": 24, "vocab_size": 32000}, torch.bfloat16),
    "wide": (LLAMA | DEEP | {"num_hidden_layers": 24, "vocab_size": 32000}, torch.float32),
}  # fmt: skip
BIG = "cuda:0=24GiB,cuda:1=24GiB,cpu=64GiB"

CASES: tuple[tuple[str, str, str], ...] = (
    # rule, model, options of inspect-map
    ("meta-device", "plain", "--device-map lm_head=meta,rest=0"),
    ("meta-device", "plain", "--device-map meta"),
    ("meta-device", "tied", "--device-map lm_head=meta,model.layer.1=7,model.layers.3.mlp=1,rest=disk"),
    ("device-absent", "plain", "--device-map model.layers.0-3=2,rest=0"),
    ("device-absent", "plain", "--device-map model.layers.0-3=2,model.layers.4=7,rest=xpu:0"),
    ("device-absent", "deep", "--device-map 3 --devices cuda:0=3GiB,cuda:1=3GiB,cpu=64GiB"),
    ("device-absent", "plain", "--device-map 0 --devices cpu=64GiB"),
    ("device-absent", "plain", "--max-memory 0=6GiB,3=1GiB,4=1GiB"),
    ("device-absent", "plain", "--device-map 3 --max-memory 0=6GiB,3=1GiB"),
    ("device-not-listed", "plain", "--max-memory 0=6GiB,cpu=1GiB --device-map model.layers.0-3=1,rest=0"),
    ("device-not-listed", "plain", "--max-memory 0=6GiB --device-map model.layers.0-3=1,lm_head=cpu,rest=0"),
    ("device-not-listed", "plain", "--max-memory 5=6GiB --device-map model.layers.0-3=1,rest=0"),
    ("block-split", "plain", "--max-memory 5=6GiB --device-map model.layers.3.mlp=1,rest=0"),
    ("unknown-module", "tied", "--max-memory 5=6GiB --device-map model.layer.3=1,rest=0"),
    ("max-memory-unlisted", "plain", "--max-memory 0=6GiB"),
    ("max-memory-unlisted", "plain", "--max-memory cpu=6GiB --device-map auto"),
    ("unknown-module", "plain", "--device-map model.layer.0-5=0,rest=1"),
    ("unknown-module", "plain", "--device-map model.layers.40=0,rest=1"),
    ("unknown-module", "plain", "--device-map model.layers.8-40=0,model.layers.12-40=1,rest=1"),
    ("unknown-module", "plain", "--device-map model.layer.*=0,lmhead=1,model.embed_tokens=0,model.norm=0"),
    ("unknown-module", "plain", "--device-map model.layer.0=0,model.layrs.0=1,rest=1"),
    ("unknown-module", "plain", "--device-map zzz.q=0"),
    ("unknown-module", "tied", "--device-map transformer.h.0-5=0,transformer.h.6-11=1,rest=0"),
    ("uncovered-parameters", "plain", "--device-map model.layer.0-10=0,model.embed_tokens=0"),
    ("uncovered-parameters", "tied", "--device-map model.layers.*=1"),
    ("rule-without-effect", "plain", "--device-map model.layers.*=0,model.layers.0-11=1,rest=0"),
    ("block-split", "plain", "--device-map model.layers.3.mlp=1,rest=0"),
    ("block-split", "plain", "--device-map model.layers.*.mlp=1,model.layers.2=0,rest=0"),
    (
        "block-split",
        "plain",
        "--device-map model.layers.*.*.q_proj=1,model.layers.7-9.mlp.up_proj=cpu,rest=0",
    ),
    ("tied-split", "tied", "--device-map lm_head=1,rest=0"),
    ("tied-split", "tied", "--device-map model.embed_tokens=1,lm_head.weight=0,rest=0"),
    ("block-order", "plain", "--device-map model.layers.*=1,model.layers.[02468]=0,lm_head=1,rest=0"),
    ("block-order", "tied", "--device-map model.layers.*=1,model.layers.[13579]=0,rest=1"),
    ("cpu-offload", "plain", "--device-map model.layers.0-9=0,rest=cpu"),
    ("cpu-offload", "deep", "--devices cuda:0=4GiB,cpu=64GiB --device-map model.layers.0-3=cpu,rest=0"),
    ("cpu-offload", "deep", "--devices cuda:0=4GiB,cpu=64GiB --device-map lm_head=cpu,rest=0"),
    ("cpu-only", "plain", "--device-map cpu"),
    ("memory-budget", "deep", "--devices cuda:0=1500MiB,cpu=64GiB --device-map cuda:0"),
    ("memory-budget", "deep", "--device-map 0 --max-memory 0=1500MiB,cpu=64GiB"),
    ("memory-budget", "wide", "--device-map cpu --devices cpu=2600MiB"),
    ("memory-tight", "deep", "--device-map 0 --devices cuda:0=1740MiB,cpu=64GiB"),
    ("disk-offload", "deep", "--device-map model.layer.20-23=disk,rest=0"),
    ("disk-offload", "tied", "--device-map disk"),
    ("disk-offload", "deep", "--device-map model.layers.12-23=disk,rest=0 --devices cuda:0=3GiB,cpu=64GiB"),
    ("no-plan-fits", "plain", "--max-memory 0=0GiB"),
    ("no-plan-fits", "deep", "--devices cuda:0=1500MiB,cpu=3500MiB"),
    ("no-plan-fits", "deep", "--devices cuda:0=1GiB,cpu=4GiB --solve-for own"),
    ("group-divides", "smol", "--group-size 128"),
    ("group-divides", "smol", "--group-size 80 --recipe fast --bits 8"),
    ("group-divides", "odd", "--group-size auto"),
    ("group-too-large", "smol", "--group-size 1024"),
    ("packing-rows", "odd", "--bits 2"),
    ("packing-columns", "odd", "--bits 3"),
    ("seq-len-positions", "plain", "--seq-len 8192"),
    ("calibration-rank", "plain", "--samples 1 --seq-len 64"),
    ("calibration-rank", "deep", "--samples 2 --seq-len 16"),
    ("half-on-cpu", "half", "--device-map cpu --devices cpu=64GiB"),
    ("target", "plain", "--target vllm --target exllamav2 --bits 3 --asym --desc-act"),
    ("target", "smol", "--target vllm --group-size 128"),
    ("target", "plain", "--target sglang --asym --bits 2"),
    ("target", "plain", "--target exllamav2"),
    ("target", "smol", "--target vllm --tp 4 --group-size 64"),
    ("target", "smol", "--tp 9 --group-size 64"),
    ("readers-lost", "plain", "--bits 2 --asym --desc-act"),
    ("readers-lost", "smol", "--group-size 16"),
)
OUTPUTS = ("output-is-model", "output-exists")
BY_HAND = (
    *("bfloat16-support", "work-required", "work-of-another-job", "module-pattern"),
    *("bits-reachable", "bits-measurable", "bits-memory", "tuning-possible"),
    "gradients-possible",
)
"""Speak of cards that `--devices` cannot describe, of unfinished work (tests/e2e/test_resume.py), of budgets,
of tuning, and of gradients (tests/e2e/test_bits.py, test_tuning.py, test_fisher.py)."""
PROSE = set(RULES) - {rule for rule, _, _ in CASES} - {*OUTPUTS, *BY_HAND}
"""Rules whose hints are advice and no options."""


def choices(hint: str) -> Iterator[list[str]]:
    """The options of each choice of a hint that can be pasted."""
    for choice in hint.split("; or "):
        if choice.startswith(("--", "gptq ")):
            yield shlex.split(choice.partition(" (")[0])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    @lru_cache
    def made(name: str) -> Path:
        config, dtype = MODELS[name]
        return fabricate(transformers.LlamaConfig(**config), root / name, dtype=dtype, shards=1)

    return made


def _once(make: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
    """`make` with its results kept, and its arguments, so that an `id` stays one."""
    kept: dict[Any, tuple[Any, Any]] = {}

    def made(*given: Any) -> Any:
        if key(*given) not in kept:
            kept[key(*given)] = (given, make(*given))
        return kept[key(*given)][1]

    return made


@pytest.fixture(scope="module", autouse=True)
def _each_model_is_opened_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (inspecting, checking):
            patch.setattr(module, "open_skeleton", _once(module.open_skeleton, key=lambda files, ref: ref))
            patch.setattr(module, "model_facts", _once(module.model_facts, key=id))
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    for name in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def call(*argv: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        code = main([*argv, "--json", "--progress", "none"])
        text = capsys.readouterr()
        assert code in (0, 3), (argv, text.out, text.err)
        found: list[dict[str, Any]] = json.loads(text.out)["findings"]
        return found

    return call


def identity(finding: dict[str, Any]) -> tuple[str, str, str]:
    """What makes a finding the same one."""
    return finding["rule"], finding["level"], finding["subject"]


def known(other: tuple[str, str, str], before: list[tuple[str, str, str]]) -> bool:
    """Whether a finding was there before; readers may have been lost together with others."""
    lost = {reader for rule, _, subject in before if rule == "readers-lost" for reader in subject.split(", ")}
    return other in before or (other[0] == "readers-lost" and lost.issuperset(other[2].split(", ")))


def follow(run: Callable[..., Any], argv: list[str], rule: str) -> int:
    """Follow every hint of every finding; the number of those of `rule`."""
    followed = 0
    found = run(*argv)
    before = [identity(finding) for finding in found]
    assert rule in [finding["rule"] for finding in found]
    for finding in found:
        for options in choices(finding["hint"]):
            after = run(*argv, *options)
            left = [
                other
                for other in map(identity, after)
                if other == identity(finding)
                or (other[:2] == identity(finding)[:2] and not known(other, before))
            ]
            assert left == [], (finding["hint"], options)
            if finding["level"] == "error":  # what was said of the map, or of the codes, is mended as a whole
                assert not {f["rule"] for f in after if f["level"] == "error"} - {f["rule"] for f in found}
            followed += finding["rule"] == rule
    return followed


@pytest.mark.parametrize(("rule", "model", "words"), CASES)
def test_what_a_hint_says_works(
    run: Callable[..., Any], models: Callable[[str], Path], rule: str, model: str, words: str
) -> None:
    argv = ["inspect-map", str(models(model)), "--devices", BIG, *shlex.split(words)]
    assert follow(run, argv, rule) or (rule, words) in NOTHING_TO_PASTE


NOTHING_TO_PASTE = {
    ("cpu-offload", "--devices cuda:0=2GiB,cpu=64GiB --solve-for own --samples 16 --seq-len 256"),
    ("no-plan-fits", "--max-memory 0=0GiB"),
}


def test_every_rule_with_options_in_its_hint_is_tried() -> None:
    for rule in PROSE:
        source = inspect.getsource(RULES[rule].check)
        hints = [line for line in source.splitlines() if "hint" in line]
        assert not [line for line in hints if '"--' in line or "instead(" in line or "elsewhere" in line], (
            rule
        )


@pytest.mark.parametrize("rule", OUTPUTS)
def test_what_the_hint_of_an_output_says_works(
    run: Callable[..., Any], models: Callable[[str], Path], tmp_path: Path, rule: str
) -> None:
    model = models("smol")
    text = tmp_path / "text.txt"
    text.write_text("some words to calibrate on. " * 400)
    common = ["quantize", str(model), "--dry-run", "--devices", BIG, "--calibration", str(text)]
    common += ["--samples", "4", "--seq-len", "64", "--out"]
    if rule == "output-is-model":
        for out in (str(model), f"{model}/", f"{model}/../{model.name}", str(model.parent)):
            assert follow(run, [*common, out], rule) == 1
        return
    made = tmp_path / "made it"
    made.mkdir()
    (made / "notes.txt").write_text("mine")
    (tmp_path / "made it-2").write_text("mine, too")
    file = tmp_path / "file"
    file.write_text("a file")
    assert follow(run, [*common, str(made)], rule) == 1
    assert follow(run, [*common, str(file)], rule) == 1
    (made / "notes.txt").unlink()
    (made / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    (made / "quantize_config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"")
    assert follow(run, [*common, str(made)], rule) == 2


def test_the_hint_about_bfloat16_is_an_option() -> None:
    card = Capability(device=Device("cuda", 0), name="T4", bfloat16=False)
    case = JobCase(facts=llama(blocks=1), work=SMALL_WORK, capabilities=(card,))
    (finding,) = bfloat16_support(case)
    assert isinstance(finding, Finding)
    assert list(choices(finding.hint)) == [["--dtype", "float16"]]


VERDICTS = (
    ("deep", "--devices cuda:0=6GiB,cpu=64GiB"),
    ("deep", "--devices cuda:0=6GiB,cpu=64GiB --recipe fast"),
    ("deep", "--devices cuda:0=5GiB,cpu=64GiB --recipe best"),
    ("deep", "--devices cuda:0=5GiB,cpu=64GiB --solve-for dense --dense-share 1.0"),
    ("deep", "--devices cuda:0=4GiB,cuda:1=4GiB,cpu=64GiB --max-memory 0=4GiB --solve-for own"),
    ("deep", "--device-map 0 --devices cuda:0=5GiB,cpu=64GiB --no-true-sequential --batch-size 4"),
    ("smol", "--group-size 128 --bits 3"),
    ("smol", "--bits 2 --asym --target vllm"),
    ("wide", "--device-map cpu --devices cpu=3GiB --samples 64 --seq-len 512"),
)


@pytest.mark.parametrize(("model", "words"), VERDICTS)
def test_inspect_map_says_what_the_job_would(
    capsys: pytest.CaptureFixture[str],
    models: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
    words: str,
) -> None:
    monkeypatch.setattr(checking, "_texts", lambda *_: (None, PreflightReport()))  # text is not compared
    options = [str(models(model)), "--devices", BIG, *shlex.split(words), "--json", "--progress", "none"]
    documents = []
    for command in (["inspect-map"], ["quantize", "--dry-run", "--out", str(tmp_path / "out")]):
        capsys.readouterr()
        main([*command, *options])
        documents.append(json.loads(capsys.readouterr().out))
    mapped, planned = documents
    assert (mapped["verdict"], mapped["reason"]) == (planned["verdict"], planned["reason"])
    assert (mapped["devices"], mapped["placement"]) == (planned["devices"], planned["placement"])
    assert mapped["findings"] == planned["findings"]
