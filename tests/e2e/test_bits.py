"""`--bits-per-weight` by the real commands: measured once, kept within the budget, run again, resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import gptq_cli
from gptq_cli.checkpoint.configs import read_formats
from gptq_cli.errors import ConfigError
from tests.conftest import TinyFactory
from tests.e2e.commands import FAST, gptq
from tests.e2e.test_resume import stop_after
from tests.e2e.test_run_again import files

QUICK = (*FAST, "--recipe", "fast")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPTQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def measured(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 11 bits per parameter in `a`, and in `cache` what was measured for it; only read."""
    place = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTQ_CACHE", str(place / "cache"))
        made = gptq(*budget_words(tiny_llama, text), "--out", place / "a")
    assert made.code == 0, made.stderr
    return place


def budget_words(model: Path, text: Path) -> tuple[object, ...]:
    return ("quantize", model, "--calibration", text, *QUICK, "--bits-per-weight", "11", "--json")


def shards_bytes(out: Path) -> int:
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def assert_kept(out: Path, report: dict[str, Any], bits: float) -> None:
    """The files are within the budget, as the report says, and the config says what every linear has."""
    choice = report["bit_choice"]
    assert choice["asked"] == bits
    assert choice["budget_bytes"] == int(bits * choice["parameters"] / 8)
    assert choice["size_bytes"] == report["size_after_bytes"] == shards_bytes(out) <= choice["budget_bytes"]
    assert choice["spare_bytes"] == choice["budget_bytes"] - choice["size_bytes"]
    assert choice["measured_tokens"] > 0
    assert choice["kl"] == pytest.approx(sum(one["kl"] for one in choice["fused"]))
    _, formats = read_formats(out)
    for one in choice["fused"]:
        for name in one["linears"]:
            found = formats.of(name.replace("*", "0"))
            assert (None if found is None else found.bits) == one["bits"], name


def test_a_budget_is_measured_once_and_kept(
    tiny_llama: Path, text: Path, tmp_path: Path, cache: Path
) -> None:
    words = ("quantize", tiny_llama, "--calibration", text, *QUICK, "--json")
    plan = gptq(*words, "--bits-per-weight", "11", "--dry-run").document
    assert plan["ok"]
    lost = [one["hint"] for one in plan["findings"] if one["rule"] == "readers-lost"]
    assert "--target exllamav2: then only what it reads is chosen" in lost
    assert plan["plan"]["bit_choice"]["measured_tokens"] == 0
    assert 0 < plan["plan"]["measuring_seconds"] < plan["plan"]["seconds"]
    assert not (cache / "bits").exists()

    made = gptq(*words, "--bits-per-weight", "11", "--out", tmp_path / "a")
    assert made.code == 0, made.stderr
    report = made.document
    assert_kept(tmp_path / "a", report, 11)
    assert len({one["bits"] for one in report["bit_choice"]["fused"]}) > 1
    assert report["bit_choice"]["spare_bytes"] < 0.02 * report["bit_choice"]["budget_bytes"]
    assert report["phase_seconds"]["bits"] > 0
    assert gptq("load", tmp_path / "a", "--verify", "--json", "--progress", "none").code == 0

    plan = gptq(*words, "--bits-per-weight", "11", "--dry-run").document["plan"]
    assert plan["bit_choice"] == report["bit_choice"]
    assert plan["measuring_seconds"] is None
    wider = gptq(*words, "--bits-per-weight", "12.5", "--out", tmp_path / "b")
    assert wider.code == 0, wider.stderr
    assert_kept(tmp_path / "b", wider.document, 12.5)
    assert wider.document["bit_choice"]["kl"] < report["bit_choice"]["kl"]
    assert "bits" not in wider.document["phase_seconds"]

    again = gptq("quantize", "--config", tmp_path / "a" / "report.json", "--out", tmp_path / "c", "--json")
    assert again.code == 0, again.stderr
    cards = {"README.md"}  # the command that is shown there differs
    first, second = ({k: v for k, v in files(tmp_path / x).items() if k not in cards} for x in "ac")
    assert first == second
    assert again.document["bit_choice"] is None
    for run in ("a", "c"):
        report_of = tmp_path / run / "report.json"
        more = gptq("quantize", "--config", report_of, "--bits-per-weight", 12.5, "--dry-run", "--json")
        assert more.document["plan"]["bit_choice"] == wider.document["bit_choice"]
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "--bits-per-weight 11" in card
    assert "--module" not in card


def test_what_is_shown(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    made = gptq(
        *("quantize", tiny_llama, "--calibration", text, *QUICK, "--out", tmp_path / "a"),
        *("--bits-per-weight", "11", "--report", page, "--module", "model.layers.0.mlp.down_proj=bits:8"),
    )
    assert made.code == 0, made.stderr
    shown = " ".join(made.stdout.split())
    assert "11 bits per parameter of the whole file, 1" in shown
    assert "predicted KL" in shown
    assert "model.layers.*.self_attn.q_proj, k_proj, v_proj: " in shown
    report = json.loads((tmp_path / "a" / "report.json").read_text(encoding="utf-8"))
    fused = {tuple(one["linears"]): one["bits"] for one in report["bit_choice"]["fused"]}
    assert fused["model.layers.0.mlp.down_proj",] == 8  # as it was said
    assert "All 13 sets of linears" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "bits", "more"),
    [
        ("qwen3_moe", 12, ("--target", "vllm")),
        ("mixtral", 9, ()),
        ("llama_tied", 14, ()),
        ("llama_tied", 19, ("--quantize-head",)),
        ("gpt2", 19, ("--target", "gptqmodel")),
    ],
)
def test_every_kind_of_model(
    name: str, bits: float, more: tuple[str, ...], tiny: TinyFactory, text: Path, tmp_path: Path
) -> None:
    words = ("quantize", tiny(name), "--calibration", text, *QUICK, "--json", "--out", tmp_path / "a")
    made = gptq(*words, "--bits-per-weight", bits, *more)
    assert made.code == 0, made.stderr
    report = made.document
    assert_kept(tmp_path / "a", report, bits)
    head = [one for one in report["bit_choice"]["fused"] if one["linears"] in (["lm_head"],)]
    assert (report["head"] is not None) == any(one["bits"] is not None for one in head)
    if "--quantize-head" in more:
        assert report["head"] is not None
    if "vllm" in more:
        assert {one["bits"] for one in report["bit_choice"]["fused"]} <= {4, 8, None}
        assert {one["bits"] for one in report["bit_choice"]["uniform"]} == {4, 8}
    checked = gptq("load", tmp_path / "a", "--verify", *more[: 2 * ("--target" in more)], "--json")
    assert checked.code == 0, checked.stdout


def test_the_same_command_goes_on(
    tiny_llama: Path, text: Path, tmp_path: Path, cache: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = budget_words(tiny_llama, text)
    with monkeypatch.context() as stopping:
        stop_after(stopping, 1)
        assert gptq(*words, "--out", tmp_path / "a").code == 1
    resumed = gptq(*words, "--out", tmp_path / "a")
    assert resumed.code == 0, resumed.stderr
    assert len(resumed.document["starts"]) == 2
    assert files(tmp_path / "a") == files(measured / "a")
    with monkeypatch.context() as stopping:
        stop_after(stopping, 1)
        assert gptq(*words, "--out", tmp_path / "b").code == 1
    shutil.rmtree(cache)  # then it is measured once more, and comes to the same
    anew = gptq(*words, "--out", tmp_path / "b")
    assert anew.code == 0, anew.stderr
    assert len(anew.document["starts"]) == 2
    assert files(tmp_path / "b") == files(measured / "a")


def test_another_budget_is_named_where_unfinished_work_does_not_fit(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the bits that were chosen for it, which nobody typed."""
    words = ("quantize", tiny_llama, "--calibration", text, *QUICK, "--json", "--out", tmp_path / "a")
    with monkeypatch.context() as stopping:
        stop_after(stopping, 1)
        assert gptq(*words, "--bits-per-weight", "11").code == 1

    def message(*more: str) -> str:
        refused = gptq(*words, *more)
        assert refused.code == 3
        (finding,) = [x for x in refused.document["error"]["findings"] if x["level"] == "error"]
        assert finding["rule"] == "work-of-another-job"
        return str(finding["message"])

    assert message("--bits-per-weight", "12.5").endswith(
        "differs in quantize.bits_per_weight (11.0, now 12.5)"
    )
    said = message("--bits", "8", "--samples", "5")
    assert "quantize.bits_per_weight (11.0, now None)" in said
    assert "calibration.samples" in said
    assert "modules" not in said


@pytest.mark.parametrize("damage", ["{", '{"key": 1}', "[]", '"digest"'])
def test_damaged_numbers_are_measured_again(
    damage: str, tiny_llama: Path, text: Path, tmp_path: Path, cache: Path, measured: Path
) -> None:
    shutil.copytree(measured / "cache", cache)
    (kept,) = (cache / "bits").iterdir()
    sound = kept.read_text(encoding="utf-8")
    kept.write_text(sound.replace('"digest": "', '"digest": "0') if "digest" in damage else damage)
    again = gptq(*budget_words(tiny_llama, text), "--out", tmp_path / "b")
    assert again.code == 0, again.stderr
    assert "it is measured again" in again.stderr
    assert kept.read_text(encoding="utf-8") == sound
    assert (measured / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()


def test_a_cache_that_cannot_be_written_costs_time_alone(
    tiny_llama: Path, text: Path, tmp_path: Path, cache: Path
) -> None:
    cache.write_text("in the way")
    made = gptq(*budget_words(tiny_llama, text), "--out", tmp_path / "a")
    assert made.code == 0, made.stderr
    assert "what fewer bits cost is not kept" in " ".join(made.document["warnings"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ("--bits-per-weight", "3", "--bits", "4"),
            2,
            "bits is 4, bits_per_weight is 3; allowed: one of them",
        ),
        (("--bits-per-weight", "0"), 2, "bits_per_weight is 0.0; allowed: a number above 0"),
        (("--bits-per-weight", "nan"), 2, "bits_per_weight is nan"),
        (("--bits-per-weight", "3"), 3, "the smallest file has 8."),
        (("--bits-per-weight", "40"), 3, "nothing would have to be quantized: everything dense has 32."),
        (("--bits-per-weight", "9", "--target", "vllm"), 3, "allowed for vllm: "),
    ],
)
def test_what_is_refused(
    words: tuple[str, ...], code: int, message: str, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    ran = gptq("quantize", tiny_llama, "--out", tmp_path / "q", "--calibration", text, *QUICK, *words)
    assert ran.code == code
    assert message in ran.stderr
    assert not (tmp_path / "q").exists()


def test_a_budget_in_a_preset_and_bits_on_the_command_line(
    tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    preset = tmp_path / "budget.toml"
    preset.write_text("bits_per_weight = 11.0\ngroup_size = 32\n")
    sizes = ("--calibration", text, *FAST[:4])
    words = ("quantize", tiny_llama, "--config", preset, "--dry-run", "--json", *sizes)
    assert gptq(*words).document["plan"]["bit_choice"]["asked"] == 11
    assert gptq(*words, "--bits", "8").document["plan"]["bits"] == 8
    preset.write_text("bits_per_weight = 11.0\nbits = 4\n")
    assert gptq(*words).code == 2
    assert gptq(*words, "--bits-per-weight", "12").document["plan"]["bit_choice"]["asked"] == 12
    inspected = gptq("inspect-map", tiny_llama, "--bits-per-weight", "3", *FAST[:4], "--json")
    assert inspected.code == 3
    assert [one["rule"] for one in inspected.document["findings"]][:1] == ["bits-reachable"]


def test_a_budget_that_is_too_large_is_one_error(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    words = (tiny_llama, "--bits-per-weight", "40", *FAST[:4], "--json")
    inspected = gptq("inspect-map", *words)
    planned = gptq("quantize", *words, "--dry-run", "--calibration", text, "--out", tmp_path / "q")
    for ran in (inspected, planned):
        found = ran.document["findings"]
        assert [one["rule"] for one in found if one["level"] == "error"] == ["bits-reachable"]


def test_from_python(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": str(text), "samples": 8, "seq_len": 48, "group_size": 32}
    report = gptq_cli.quantize(tiny_llama, tmp_path / "a", bits_per_weight=11, recipe="fast", **options)
    assert report.bit_choice is not None
    assert report.bit_choice.size_bytes == shards_bytes(tmp_path / "a") <= report.bit_choice.budget_bytes
    with pytest.raises(ConfigError, match="allowed: one of them"):
        gptq_cli.quantize(tiny_llama, tmp_path / "b", bits=4, bits_per_weight=11, **options)
