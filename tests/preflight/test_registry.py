"""The registry knows every rule, and asks those about files, sizes, calibration, dtype and the output."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gptq_cli
from gptq_cli.checkpoint import place, working_folder
from gptq_cli.checkpoint import rules as verify_rules
from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.errors import ConfigError
from gptq_cli.findings import Finding
from gptq_cli.model.facts import ModelFacts, StackFact, TensorFact
from gptq_cli.model.source import READABLE, SourceProblem
from gptq_cli.placement.device import CPU, Device, format_size
from gptq_cli.planning.cases import Capability, OutputFacts, Work
from gptq_cli.planning.memory import quantized_bytes
from gptq_cli.preflight.facts import output_facts
from gptq_cli.preflight.registry import MODULES, RULES, check_quantize, explain
from gptq_cli.preflight.rules import model_files
from gptq_cli.results.kept import TOO_SMALL, KeptDense
from gptq_cli.rules import Rule, rules_in
from gptq_cli.targets.facts import TARGETS
from gptq_cli.targets.rules import MODULES as TARGET_MODULES
from tests.preflight.shapes import llama

DOCS = Path(__file__).parents[2] / "docs/rules.md"
FACTS = llama(blocks=2, hidden=576, inner=1536, vocab=1000)
CUDA = Device("cuda", 0)


def found(facts: ModelFacts = FACTS, rule: str = "", **asked: object) -> list[Finding]:
    """Findings of one rule."""
    quantize = {
        k: v for k, v in asked.items() if k in ("bits", "group_size", "sym", "solve_for", "fisher_tokens")
    }
    data = {k: v for k, v in asked.items() if k in ("samples", "seq_len")}
    rest = {k: v for k, v in asked.items() if k not in quantize and k not in data}
    work = Work(
        QuantizeConfig(**{"group_size": 64} | quantize),  # type: ignore[arg-type]
        CalibrationConfig(**{"samples": 32, "seq_len": 512} | data),  # type: ignore[arg-type]
    )
    report = check_quantize(facts, work, **rest)  # type: ignore[arg-type]
    return [finding for finding in report.findings if not rule or finding.rule == rule]


def test_a_sound_job_has_one_note() -> None:
    assert [(f.rule, f.level) for f in found()] == [("left-dense", "note")]


def test_group_divides_names_the_columns_and_the_sizes_that_do() -> None:
    (finding,) = found(rule="group-divides", group_size=128)
    assert finding.level == "error"
    assert "group size 128 does not divide the input columns 576 of 12 linears" in finding.message
    assert finding.hint == "--group-size 64 (64, 32, 16, 8 divide all; -1: one group per row)"
    assert len(finding.modules) == 12
    assert found(rule="group-divides", group_size=-1) == []


def test_group_too_large() -> None:
    (finding,) = found(rule="group-too-large", group_size=1024)
    assert "larger than the input columns 576 of 12 linears" in finding.message
    assert found(rule="group-divides", group_size=1024)[0].message.endswith("1536 of 2 linears")


@pytest.mark.parametrize(("bits", "step"), [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_packing(bits: int, step: int) -> None:
    odd = llama(blocks=1, hidden=step * 6, inner=step * 10 + step // 2)
    (rows,) = found(odd, "packing-rows", bits=bits, group_size=-1)
    (columns,) = found(odd, "packing-columns", bits=bits, group_size=-1)
    assert f"multiple of {step}" in rows.message
    assert rows.modules == ("model.layers.0.mlp.down_proj",)
    assert columns.modules == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    assert rows.level == columns.level == "error"
    even = llama(blocks=1, hidden=step * 6, inner=step * 10)
    assert found(even, "packing-rows", bits=bits, group_size=-1) == []


def test_packing_names_a_width_that_packs() -> None:
    odd = llama(blocks=1, hidden=48, inner=72)
    (finding,) = found(odd, "packing-columns", bits=3, group_size=-1) or [None]
    assert finding is not None
    assert finding.hint == "--bits 8"


def test_windows_longer_than_the_model_knows() -> None:
    (finding,) = found(rule="seq-len-positions", seq_len=8192)
    assert (finding.level, finding.hint) == ("error", "--seq-len 4096")
    assert found(replace(FACTS, max_positions=None), "seq-len-positions", seq_len=8192) == []


def test_fewer_tokens_than_columns() -> None:
    (finding,) = found(rule="calibration-rank", samples=2, seq_len=256)
    assert finding.level == "warning"
    assert "512 calibration tokens are fewer than the 1536 input columns" in finding.message
    assert found(rule="calibration-rank", samples=6, seq_len=256) == []


def test_no_linears() -> None:
    (finding,) = found(replace(FACTS, linears=()), "no-linears")
    assert finding.level == "error"
    assert "has no linear" in finding.message
    (finding,) = found(replace(FACTS, linears=(), by_module=FACTS.linears), "no-linears")
    assert f"all {len(FACTS.linears)} linears that could be quantized are left dense" in finding.message


def test_what_is_quantized_or_damaged_is_not_said_to_have_no_linears() -> None:
    """It follows from the other finding, and is not true of the model."""
    without = replace(FACTS, linears=())
    assert found(replace(without, already_quantized="quant_method 'awq'"), "no-linears") == []
    missing = SourceProblem("missing-scale", "a.weight", "has none")
    assert found(without, "no-linears", problems=(missing,)) == []


def test_blocks_without_an_order() -> None:
    why = "layers.0 is called 2 times before the last block is called"
    (finding,) = found(replace(FACTS, obstacle=why), "blocks-in-order")
    assert finding.level == "error"
    assert finding.message.endswith(f"cannot be quantized one after another: {why}")
    assert found(FACTS, "blocks-in-order") == []


def test_fused_experts_with_their_share() -> None:
    experts = TensorFact("model.layers.0.mlp.experts.gate_up_proj", 90_000_000, 180_000_000)
    facts = replace(
        FACTS, tensors=(*FACTS.tensors, experts), fused=(StackFact(experts.name, "it is one of a kind"),)
    )
    (finding,) = found(facts, "fused-experts")
    assert finding.level == "warning"
    assert f"{90_000_000 / facts.parameters:.0%} of parameters: it is one of a kind" in finding.message
    assert finding.size_bytes == 180_000_000
    assert found(facts, "left-dense")[0].level == "note"


def test_experts_are_told_that_the_dense_target_is_not_theirs() -> None:
    linears = tuple(replace(x, routed=x.name.startswith("model.layers.0.mlp")) for x in FACTS.linears)
    facts = replace(FACTS, linears=linears)
    (finding,) = found(facts, "experts-own-target")
    assert finding.level == "note"
    assert "3 routed linears" in finding.message
    assert found(facts, "experts-own-target", solve_for="own") == []
    assert found(FACTS, "experts-own-target") == []


def test_gradients_that_cannot_be_taken_are_a_warning() -> None:
    open_flow = replace(FACTS, between="it adds what was there before", shared=("model.layers.1.a",))
    (finding,) = found(open_flow, "gradients-possible", fisher_tokens=4096)
    assert (finding.level, finding.subject) == ("warning", "--fisher-tokens 4096")
    assert finding.message == (
        "gradients of LlamaForCausalLM cannot be taken: the model's own code runs between its blocks, and "
        "blocks share weights; the rows of a linear are solved apart"
    )
    assert finding.hint == "--fisher-tokens 0"
    assert found(FACTS, "gradients-possible", fisher_tokens=4096) == []
    assert found(open_flow, "gradients-possible") == []


def test_gradients_take_room_on_the_disk() -> None:
    room = output(free_bytes=100_000_000)
    assert found(rule="output-disk-full", output=room) == []
    (finding,) = found(rule="output-disk-full", output=room, fisher_tokens=4096 * 4, samples=128)
    assert "and gradients 54.0 MiB while the run works" in finding.message
    assert finding.hint.endswith("or --fisher-tokens 0")
    (finding,) = found(rule="output-disk-full", output=output(free_bytes=1000), fisher_tokens=512)
    size = format_size(quantized_bytes(FACTS, QuantizeConfig(group_size=64)))
    assert f"takes about {size}, and 61.0 MiB are kept for files beside it" in finding.message
    assert finding.hint.endswith("on another disk")


def test_mostly_dense_is_a_warning() -> None:
    (finding,) = found(llama(blocks=2, hidden=64, inner=128, vocab=50_000), "left-dense", group_size=32)
    assert finding.level == "warning"
    assert "model.embed_tokens.weight 49%, lm_head.weight 49%" in finding.message


def test_half_precision() -> None:
    half = llama(blocks=2, dtype="float16")
    assert found(half, "half-on-cpu", devices=(CPU,))[0].level == "warning"
    assert found(half, "half-on-cpu", devices=(CUDA, CPU)) == []
    assert found(FACTS, "half-on-cpu", devices=(CPU,)) == []
    old, new = Capability(CUDA, "Tesla T4", bfloat16=False), Capability(CUDA, "H200", bfloat16=True)
    (finding,) = found(FACTS, "bfloat16-support", capabilities=(old,))
    assert (finding.level, finding.hint) == ("warning", "--dtype float16")
    assert "Tesla T4" in finding.message
    assert found(FACTS, "bfloat16-support", capabilities=(new,)) == []
    assert found(half, "bfloat16-support", capabilities=(old,)) == []


def test_already_quantized() -> None:
    (finding,) = found(replace(FACTS, already_quantized="quant_method 'awq'"), "already-quantized")
    assert finding.level == "error"
    assert "(quant_method 'awq')" in finding.message
    assert "original model" in finding.hint


CASES = ("already-quantized", "decoded-source", "weights-unsound")
KINDS = [rule.id for rule in rules_in(model_files) if rule.id not in CASES]


@pytest.mark.parametrize("kind", KINDS)
def test_every_problem_of_the_files_is_a_finding(kind: str) -> None:
    problem = SourceProblem(kind, "model-00001.safetensors", "it is broken", "")
    (finding,) = found(rule=kind, problems=(problem,))
    warnings = ("link-left-out", "pointer-left-out", "left-over-config", "unlisted-tensor")
    level = "warning" if kind in warnings else "error"
    assert (finding.level, finding.subject, finding.message) == (level, problem.subject, "it is broken")
    assert finding.hint


def test_what_would_stay_dense_does_not_stand_beside_an_error_about_the_files() -> None:
    """The numbers of a broken model mean nothing; those of a sound one that is refused otherwise do."""
    small = KeptDense(name="model.layers.*.small", reason=TOO_SMALL, linears=3, weights=8)
    facts = replace(FACTS, fused=(StackFact("model.layers.0.experts", "why"),), kept=(small,))
    about = {"left-dense", "fused-experts", "small-linears"}

    def said(**more: object) -> set[str]:
        return {f.rule for f in found(facts, **more)} & about

    broken = SourceProblem("missing-weight", "model.layers.0.mlp.up_proj.weight", "it is gone")
    left_out = SourceProblem("link-left-out", "LICENSE", "leads out of the directory")
    assert said() == about
    assert said(problems=(left_out,)) == said(group_size=128) == about
    assert said(problems=(broken,)) == set()
    quantized = replace(facts, already_quantized="gptq")
    assert not {f.rule for f in found(quantized)} & about


def test_an_unknown_problem_is_not_lost() -> None:
    (finding,) = found(rule="weights-unsound", problems=(SourceProblem("new-kind", "x", "odd"),))
    assert (finding.level, finding.message) == ("error", "odd")


def output(**changed: object) -> OutputFacts:
    sound = OutputFacts(
        out="out",
        exists=False,
        is_directory=False,
        is_empty_directory=False,
        is_checkpoint=False,
        is_model_directory=False,
        writable=True,
        parent="/somewhere",
        free_bytes=10**12,
    )
    return replace(sound, **changed)  # type: ignore[arg-type]


def replaced(**changed: object) -> OutputFacts:
    return output(exists=True, is_directory=True, is_checkpoint=True, **changed)


@pytest.mark.parametrize(
    ("facts", "overwrite", "rule"),
    [
        (output(), False, None),
        (output(exists=True, is_directory=True, is_empty_directory=True), False, None),
        (output(exists=True, is_directory=True), False, "output-exists"),
        (output(exists=True, is_directory=True), True, "output-exists"),
        (output(exists=True, is_directory=True, is_checkpoint=True), False, "output-exists"),
        (output(exists=True, is_directory=True, is_checkpoint=True), True, None),
        (output(name_bytes=256), False, "output-name-too-long"),
        (output(exists=True), True, "output-exists"),
        (output(exists=True, is_directory=True, is_model_directory=True), True, "output-is-model"),
        (output(writable=False), False, "output-unwritable"),
        (output(failure="/x: Permission denied"), False, "output-unwritable"),
        (replaced(is_removable=False), True, "output-unwritable"),
        (replaced(is_fixed=True), True, "output-exists"),
        (output(exists=True, is_directory=True, is_fixed=True), False, "output-exists"),
        (output(exists=True, is_directory=True, is_fixed=True, is_empty_directory=True), False, None),
        (output(out="q\udcff", is_text=False), False, "output-name-not-text"),
        (
            output(folder_taken="/somewhere/.out.gptq", why_taken="no run made it"),
            False,
            "output-folder-taken",
        ),
        (output(busy="out is being written by another run: x", busy_hint="wait"), False, "output-busy"),
        (output(free_bytes=1000), False, "output-disk-full"),
    ],
)
def test_output(facts: OutputFacts, overwrite: bool, rule: str | None) -> None:
    findings = [f for f in found(output=facts, overwrite=overwrite) if f.rule.startswith("output")]
    assert [f.rule for f in findings] == ([rule] if rule else [])
    assert all(f.level == "error" and f.hint for f in findings)


def test_output_facts(tmp_path: Path) -> None:
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    absent = output_facts(str(tmp_path / "a" / "b" / "c"), model)
    assert (absent.exists, absent.writable, absent.parent) == (False, True, str(tmp_path))
    assert absent.free_bytes > 0
    assert output_facts(str(model), model).is_model_directory
    assert output_facts(str(model / ".." / "m"), model).is_model_directory
    assert output_facts(str(tmp_path / "models"), model).is_model_directory
    assert not output_facts(str(model / "out"), model).is_model_directory
    link = tmp_path / "link"
    link.symlink_to(model)
    assert output_facts(str(link), model).is_model_directory
    empty = tmp_path / "empty"
    empty.mkdir()
    assert output_facts(str(empty), model).is_empty_directory
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    assert output_facts(str(dangling), None).exists


def test_an_output_below_a_file_or_at_a_link_to_nothing(tmp_path: Path) -> None:
    """Each is called what it is."""
    (tmp_path / "file").touch()
    for name in ("file/out", "file/a/out"):
        (below,) = found(rule="output-unwritable", output=output_facts(str(tmp_path / name), None))
        assert below.message == f"{tmp_path / 'file'} is not a directory"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    (astray,) = found(rule="output-exists", output=output_facts(str(link), None))
    assert astray.message == f"{link} is a link to {tmp_path / 'nowhere'}, which is not there"
    (there,) = found(rule="output-exists", output=output_facts(str(tmp_path / "file"), None))
    assert there.message.endswith("exists and is not a directory")


def test_leftovers_and_missing_locks_are_told_and_stop_nothing() -> None:
    facts = output(leftovers=("removed /x",), unlocked="this file system has no locks (No locks available)")
    findings = {f.rule: f for f in found(output=facts) if f.rule.startswith("output")}
    assert {rule: f.level for rule, f in findings.items()} == {
        "output-leftovers": "warning",
        "output-unlocked": "note",
    }
    assert findings["output-leftovers"].message == "removed /x"


def test_output_facts_of_names_that_no_reader_opens(tmp_path: Path) -> None:
    assert output_facts(str(tmp_path / "q"), None).is_text
    for name in ("q\udcff", "q\0"):
        assert not output_facts(str(tmp_path / name), None).is_text
    assert output_facts(str(tmp_path / ("x" * 300) / "q"), None).name_bytes == 300


def test_output_facts_of_a_directory_in_one_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "theirs" / "q"
    out.mkdir(parents=True)
    real = place.may_write
    monkeypatch.setattr(place, "may_write", lambda path: path != out.parent and real(path))
    facts = output_facts(str(out), None)
    assert (facts.is_fixed, facts.writable, facts.is_empty_directory) == (True, True, True)
    assert facts.parent == str(out)


def test_output_facts_of_a_run_that_ended_and_of_one_that_works(tmp_path: Path) -> None:
    out = tmp_path / "q"
    folder = working_folder.WorkingFolder(tmp_path / ".q.gptq", out)
    folder.claim()
    folder.mark()
    (folder.path / "result").mkdir()
    (folder.path / "result" / "model.safetensors").write_bytes(b"x" * 10_000)
    marker = folder.path / "run.json"
    marker.write_text(marker.read_text().replace(f'"pid": {os.getpid()}', '"pid": 99999999'))
    facts = output_facts(str(out), None)
    assert "process 99999999" in facts.busy
    assert facts.leftovers == ()
    folder.let_go()
    facts = output_facts(str(out), None)
    assert facts.busy == ""
    assert len(facts.leftovers) == 1
    assert facts.leftovers[0].startswith(f"the run will remove {folder.path}, left by a run that ended")
    assert (folder.path / "result" / "model.safetensors").is_file()
    for name in ("run.json", "run-copy.json"):
        (folder.path / name).unlink()
    facts = output_facts(str(out), None)
    assert (facts.leftovers, facts.folder_taken) == ((), str(folder.path))


def test_everything_at_once() -> None:
    rules = {
        f.rule
        for f in found(
            replace(FACTS, already_quantized="gptq"),
            bits=3,
            group_size=128,
            samples=1,
            seq_len=9000,
            output=output(exists=True, writable=False),
            problems=(SourceProblem("truncated-shard", "x", "short"),),
        )
    }
    assert rules >= {
        "already-quantized",
        "truncated-shard",
        "group-divides",
        "seq-len-positions",
        "output-exists",
        "output-unwritable",
    }


def test_bits_and_groups_are_judged_where_they_were_asked_for() -> None:
    odd = llama(blocks=1, hidden=576, inner=1532)
    about = {"bits": 3, "group_size": 128, "sym": False}
    rules = ("group-divides", "packing-rows", "packing-columns", "readers-lost")

    def spoke(asked: frozenset[str] | None) -> set[str]:
        return {f.rule for f in found(odd, asked=asked, **about) if f.rule in rules}

    assert spoke(frozenset()) == set()
    assert spoke(frozenset({"group_size"})) == {"group-divides", "readers-lost"}
    assert spoke(frozenset({"bits"})) == {"packing-rows", "packing-columns", "readers-lost"}
    assert spoke(frozenset({"sym"})) == {"readers-lost"}
    assert spoke(None) == set(rules)
    assert found(odd, "target", asked=frozenset(), targets=("vllm",), **about)


def test_one_list_of_group_sizes() -> None:
    """What divides, what readers take and what auto chooses agree: no hint names a size that is refused."""
    said = found(group_size=128)
    assert [f.rule for f in said] == ["group-divides", "left-dense"]
    assert found(group_size="auto") == found(group_size=64)
    (finding,) = found(rule="readers-lost", group_size=16)[:1]
    assert finding.hint == "--group-size 64"


def test_auto_that_finds_nothing_names_the_linears_that_no_size_divides() -> None:
    odd = llama(blocks=2, hidden=512, inner=720)
    (finding,) = found(odd, "group-divides", group_size="auto")
    assert finding.message == "group size 32 does not divide the input columns 720 of 2 linears"
    assert finding.hint == "--group-size 16 (16, 8 divide all; -1: one group per row)"


def test_every_rule_has_one_id_an_explanation_and_levels() -> None:
    ids = [rule.id for module in MODULES for rule in rules_in(module)]
    assert sorted(ids) == sorted(RULES)
    for name, rule in RULES.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
        assert len(explain(name)) > 30
        assert rule.summary.endswith(".")
        assert rule.levels
        assert set(rule.levels) <= {"error", "warning", "note"}


def test_every_module_of_rules_is_registered() -> None:
    """A rule that is defined anywhere in the package is one that --explain knows."""
    package = Path(gptq_cli.__file__).parent
    made = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"^@rule\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert made == {str(Path(str(module.__file__)).relative_to(package)) for module in MODULES}


def test_topics_are_words_of_those_who_ask() -> None:
    fields = {field.name for field in dataclasses.fields(QuantizeConfig)}
    parts = {part for part, _ in verify_rules.PARTS}
    for module in MODULES:
        of_targets = {module: set(TARGETS) for module in TARGET_MODULES}
        known = {**of_targets, verify_rules: parts}.get(module, fields)
        for rule in rules_in(module):
            assert set(rule.topics) <= known, rule.id
            assert rule.topics or module not in (*TARGET_MODULES, verify_rules), f"nobody asks {rule.id}"


def test_findings_of_readable_problems_can_be_explained() -> None:
    """`load --verify` says them under the kind of the problem."""
    assert set(READABLE) <= set(RULES)


@pytest.mark.parametrize("rule", ["disk-offload", "four-bits-only", "scales-finite", "target"])
def test_explain(rule: str) -> None:
    assert explain(rule) == inspect.getdoc(RULES[rule].check)


def test_explain_an_unknown_rule() -> None:
    with pytest.raises(ConfigError, match=r"^'disk-ofload' is not a rule$") as caught:
        explain("disk-ofload")
    assert caught.value.hint == "did you mean disk-offload or cpu-offload?"
    with pytest.raises(ConfigError, match="available: tokenizer, calibration-text, "):
        explain("")


def rules_block() -> str:
    """One table per module of rules."""
    parts = []
    for module in MODULES:
        about = str(module.__doc__).splitlines()[0].removeprefix("Rules about ")
        heading = re.split(r"[:.]", about)[0]
        rows = [
            f"### {heading[0].upper()}{heading[1:]}",
            "",
            "| rule | level | says | asked by |",
            "|---|---|---|---|",
        ]
        for rule in rules_in(module):
            cells = (
                f"`{rule.id}`",
                ", ".join(rule.levels),
                first_sentence(rule.summary),
                asked_by(module, rule),
            )
            rows.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def first_sentence(text: str) -> str:
    """Up to the first full stop after a word; `(.bin, .pt)` and `-9.` count as words."""
    return re.split(r"(?<=[\w`)])\.(?:\s|$)", text)[0].replace("|", "\\|")


def asked_by(module: object, rule: Rule[Any]) -> str:
    if module in TARGET_MODULES:
        return "all targets" if set(rule.topics) == set(TARGETS) else ", ".join(rule.topics)
    if module is verify_rules:
        return "verify"
    if rule.id == "broken-settings":
        return "preflight, verify"
    return "preflight, verify (a warning)" if rule.id in READABLE else "preflight"


def test_the_documentation_lists_every_rule() -> None:
    text = DOCS.read_text(encoding="utf-8")
    begin, end = "<!-- rules: begin, written by `make golden` -->\n", "<!-- rules: end -->"
    before, rest = text.split(begin)
    found, after = rest.split(end)
    expected = f"\n{rules_block()}\n\n"
    if os.environ.get("UPDATE_GOLDEN"):
        DOCS.write_text(before + begin + expected + end + after, encoding="utf-8")
        return
    assert found == expected, "if this is meant: make golden"
