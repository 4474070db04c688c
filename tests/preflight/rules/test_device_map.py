"""Each rule about the text of a map: it speaks when it must, says what to do, and is silent otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.planning.cases import Environment, MapCase
from gptq_cli.preflight.rules import device_map as rules_map
from gptq_cli.rules import Rule, rules_in
from tests.preflight.shapes import case, llama, resolved, rules_of, without

SOUND = "model.embed_tokens=0,model.layers.0-5=0,model.layers.6-11=1,rest=1"


@pytest.mark.parametrize("rule", rules_in(rules_map), ids=str)
@pytest.mark.parametrize("spec", [SOUND, "auto", "cuda:0", "cpu"])
def test_a_sound_map_has_no_findings(rule: Rule[MapCase], spec: str) -> None:
    assert rule(case(spec, max_memory="0=10GiB,1=10GiB,cpu=8GiB")) == []


def test_meta_device() -> None:
    (finding,) = rules_map.meta_device(case("lm_head=meta,rest=0"))
    assert (finding.rule, finding.level, finding.modules) == ("meta-device", "error", ("lm_head",))
    assert finding.hint == '--device-map "lm_head=cpu,rest=cuda:0"'
    assert resolved("meta").placement is None


def test_device_absent_names_what_is_there_and_a_map_that_works() -> None:
    (finding,) = rules_map.device_absent(case("model.layers.0-5=0,rest=3"))
    assert finding.subject == "cuda:3"
    assert "cuda:0, cuda:1, cpu" in finding.message
    assert finding.hint == '--device-map "model.layers.0-5=cuda:0,rest=cuda:1"'
    assert finding.modules == ("",)


def test_device_absent_without_any_accelerator() -> None:
    (finding,) = rules_map.device_absent(case("0", devices="cpu=8GiB"))
    assert finding.hint == '--device-map "cpu"'


def test_device_absent_in_max_memory() -> None:
    (finding,) = rules_map.device_absent(case(max_memory="2=10GiB"))
    assert finding.subject == "--max-memory"


@pytest.mark.parametrize(
    ("pattern", "guess"),
    [
        ("model.layer.0-5", "model.layers.0-5"),
        ("model.embed_token", "model.embed_tokens"),
        ("lmhead", "lm_head"),
        ("model.layers.3.mlp.gate", "model.layers.3.mlp.gate_proj"),
        ("layers.4", "model.layers.4"),
    ],
)
def test_unknown_module_guesses(pattern: str, guess: str) -> None:
    (finding,) = rules_map.unknown_module(case(f"{pattern}=1,rest=0"))
    assert (finding.level, finding.subject) == ("error", pattern)
    assert guess in finding.hint


def test_unknown_module_without_a_guess_lists_the_top() -> None:
    (finding,) = rules_map.unknown_module(case("zzzzzz.q=1,rest=0"))
    assert "top-level names: model, model.embed_tokens" in finding.hint


def test_unknown_module_knows_ranges_globs_tensors_and_tied_names() -> None:
    facts = llama(tied=True)
    spec = "model.layers.11-99=1,model.*.1*=1,model.norm.weight=1,lm_head.weight=0,rest=0"
    assert rules_map.unknown_module(case(spec, facts)) == []


def test_uncovered_parameters() -> None:
    (finding,) = rules_map.uncovered_parameters(case("model.layers.0-10=0,model.embed_tokens=0,model.norm=0"))
    assert finding.level == "error"
    assert finding.modules == ("model.layers.11", "lm_head")
    assert finding.size_bytes == 2 * (4 * 1024**2 + 3 * 1024 * 4096 + 1024 + 32000 * 1024)
    assert finding.hint.endswith(',rest=cuda:0"')
    made = resolved("model.layers.0-10=0")
    assert made.placement is None
    assert not made.report.ok


@pytest.mark.parametrize("covered", ["model.embed_tokens=0", "lm_head=0"])
def test_a_rule_for_a_tensor_covers_what_is_tied_to_it(covered: str) -> None:
    """The embedding and the head are one tensor, so what is said of one holds for the other."""
    spec = f"{covered},model.layers.*=1,model.norm=1,model.rotary_emb=1"
    facts = llama(tied=True)
    assert rules_map.uncovered_parameters(case(spec, facts)) == []
    found = resolved(spec, facts)
    assert found.report.ok
    assert found.placement is not None
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert str(found.placement.device_of(name)) == "cuda:0"
    assert rules_map.uncovered_parameters(case(spec, llama()))


def test_uncovered_tied_names() -> None:
    facts = llama(tied=True)
    (finding,) = rules_map.uncovered_parameters(case("model.layers.*=0,model.norm=0", facts))
    assert finding.modules == ("model.embed_tokens", "lm_head")


def test_a_buffer_needs_no_rule() -> None:
    spec = "model.embed_tokens=0,model.layers.*=0,model.norm=0,lm_head=1"
    assert rules_map.uncovered_parameters(case(spec)) == []
    assert rules_of(resolved(spec)) == ["uncovered-buffers"]


def test_prefix_collision() -> None:
    (finding,) = rules_map.prefix_collision(case("model.layers.1=0,rest=1"))
    assert (finding.level, finding.modules) == ("note", ("model.layers.10", "model.layers.11"))
    assert rules_map.prefix_collision(case("model.layers.1=0,model.layers.1*=0,rest=1")) == []


def test_rule_without_effect() -> None:
    (finding,) = rules_map.rule_without_effect(case("model.layers.*=0,model.layers.0-11=1,rest=0"))
    assert (finding.level, finding.subject) == ("warning", "model.layers.*")


def test_a_rule_for_a_tied_name_has_an_effect() -> None:
    assert rules_map.rule_without_effect(case("lm_head=0,rest=1", llama(tied=True))) == []


def test_max_memory_above_free() -> None:
    (finding,) = rules_map.max_memory_above_free(case(max_memory="0=30GiB,1=20GiB"))
    assert (finding.level, finding.subject) == ("warning", "cuda:0")
    assert "24.0 GiB are free" in finding.message


def test_environment() -> None:
    here = replace(case(), given=False, environment=Environment("2", (("CUDA_VISIBLE_DEVICES", "1,3"),)))
    local, visible = rules_map.environment(here)
    assert (local.level, local.subject) == ("warning", "LOCAL_RANK")
    assert (visible.level, visible.subject) == ("note", "CUDA_VISIBLE_DEVICES")
    assert rules_map.environment(replace(here, given=True)) == []


def test_all_findings_at_once_errors_first() -> None:
    spec = "model.layer.0=0,lm_head=7,model.layers.1=meta,model.layers.*=0"
    found = resolved(spec).report.findings
    assert {f.rule for f in found} >= {
        "unknown-module",
        "device-absent",
        "meta-device",
        "uncovered-parameters",
    }
    levels = [f.level for f in found]
    assert levels == sorted(levels, key=["error", "warning", "note"].index)


def test_bare_indexes_mean_the_accelerator_that_is_there() -> None:
    made = resolved("0", devices="xpu:0=24GiB,cpu=64GiB")
    assert made.placement is not None
    assert str(made.placement.main_device) == "xpu:0"
    assert rules_of(made) == []


def test_without_keeps_the_rest() -> None:
    assert len(without(llama(), "lm_head.weight").tensors) == len(llama().tensors) - 1
    assert DeviceMap.parse(SOUND).rules


def test_a_device_that_max_memory_leaves_out_cannot_be_in_the_map() -> None:
    (finding,) = rules_map.device_not_listed(case("model.layers.0-5=1,rest=0", max_memory="0=6GiB,cpu=20GiB"))
    assert (finding.level, finding.subject, finding.modules) == ("error", "cuda:1", ("model.layers.0-5",))
    assert finding.message == "the device map uses cuda:1, but --max-memory lists only cuda:0, cpu"
    assert finding.hint.startswith('--max-memory "cuda:0=6GiB,cpu=20GiB,cuda:1=24GiB"; or --device-map "')
    made = resolved("model.layers.0-5=1,rest=0", max_memory="0=6GiB,cpu=20GiB")
    assert rules_of(made, "error") == ["device-not-listed"]
    assert rules_of(resolved("rest=0,lm_head=cpu", max_memory="0=6GiB"), "error") == ["device-not-listed"]


def test_what_max_memory_leaves_out_is_said() -> None:
    (finding,) = rules_map.max_memory_unlisted(case(max_memory="0=6GiB"))
    assert (finding.level, finding.subject) == ("note", "cuda:1, cpu")
    assert finding.message == "--max-memory does not list cuda:1 and cpu, so nothing is placed there"
    assert rules_map.max_memory_unlisted(case()) == []


def test_one_hint_mends_all_absent_devices() -> None:
    found = rules_map.device_absent(case("model.layers.0-5=4,model.embed_tokens=xpu:0,rest=3"))
    assert [finding.subject for finding in found] == ["cuda:3", "cuda:4", "xpu:0"]
    assert {finding.hint for finding in found} == {
        '--device-map "model.layers.0-5=cuda:1,model.embed_tokens=cuda:1,rest=cuda:1"'
    }
    found = rules_map.device_absent(case(max_memory="0=1GiB,2=10GiB,3=5GiB"))
    assert {finding.hint for finding in found} == {'--max-memory "cuda:0=1GiB"'}


def test_a_number_behind_the_last_block() -> None:
    (finding,) = rules_map.unknown_module(case("model.layers.40=1,rest=0"))
    assert finding.hint == '--device-map "cuda:0" (there is model.layers.0-11)'
