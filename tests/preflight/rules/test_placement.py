"""Each rule about a finished placement."""

from __future__ import annotations

import pytest

from tests.preflight.shapes import BIG, llama, resolved, rules_of


def test_a_sound_placement_has_no_findings() -> None:
    spec = "model.embed_tokens=0,model.layers.0-5=0,model.layers.6-11=1,rest=1"
    made = resolved(spec)
    assert rules_of(made) == []
    assert made.placement is not None
    assert [str(d) for d in made.placement.devices] == ["cuda:0", "cuda:1"]


def test_block_split() -> None:
    made = resolved("model.layers.3.mlp=1,rest=0")
    (finding,) = [f for f in made.report.findings if f.rule == "block-split"]
    assert (finding.level, finding.subject) == ("error", "model.layers.3")
    assert "cuda:0 and cuda:1" in finding.message
    assert set(finding.modules) == {
        "model.layers.3.self_attn",
        "model.layers.3.input_layernorm",
    }
    assert "model.layers.3=cuda:1" in finding.hint


def test_a_block_named_in_parts_on_one_device_is_whole() -> None:
    made = resolved("model.layers.3.mlp=0,model.layers.3.self_attn=0,rest=0")
    assert "block-split" not in rules_of(made)


def test_tied_split() -> None:
    made = resolved("lm_head=1,rest=0", llama(tied=True))
    (finding,) = [f for f in made.report.findings if f.rule == "tied-split"]
    assert (finding.level, finding.modules) == ("error", ("model.embed_tokens", "lm_head"))
    assert "lm_head=cuda:0" in finding.hint
    assert "tied-split" not in rules_of(resolved("lm_head=0,rest=0", llama(tied=True)))


def test_block_order() -> None:
    made = resolved("model.layers.*=1,model.layers.[02468]=0,rest=0")
    (finding,) = [f for f in made.report.findings if f.rule == "block-order"]
    assert finding.level == "warning"
    assert "9 times; 1 would do" in finding.message
    assert "model.layers.0-4=cuda:0,model.layers.5-11=cuda:1,rest=cuda:0" in finding.hint
    assert "block-order" not in rules_of(resolved("model.layers.0-4=0,rest=1"))


def test_cpu_offload_names_the_chain_and_what_is_skipped() -> None:
    made = resolved("model.layers.0-9=0,model.embed_tokens=0,rest=cpu")
    (finding,) = [f for f in made.report.findings if f.rule == "cpu-offload"]
    assert finding.level == "warning"
    assert finding.message.startswith("CPU offload is not recommended: 5 modules (")
    assert "execute on cuda:0" in finding.message
    assert "order: model.layers.10, model.layers.11, model.norm, lm_head" in finding.message
    assert "no hook for model.rotary_emb (no parameters)" in finding.message
    assert made.offload == ("model.layers.10", "model.layers.11", "model.norm", "lm_head")
    assert made.offload_skipped == ("model.rotary_emb",)
    assert made.report.ok


@pytest.mark.parametrize("devices", [BIG, "cpu=64GiB"])
def test_cpu_alone_is_a_plain_run_without_a_warning(devices: str) -> None:
    made = resolved("cpu", devices=devices)
    assert made.offload == made.offload_skipped == ()
    assert rules_of(made, "warning") == rules_of(made, "error") == []
    assert made.placement is not None
    assert [entry.name for entry in made.placement.entries] == [""]
    assert rules_of(made) == (["cpu-only"] if "cuda" in devices else [])


def test_uncovered_buffers_go_to_the_main_device() -> None:
    made = resolved("model.embed_tokens=1,model.layers.*=1,model.norm=1,lm_head=0")
    (finding,) = [f for f in made.report.findings if f.rule == "uncovered-buffers"]
    assert (finding.level, finding.modules) == ("note", ("model.rotary_emb",))
    assert made.placement is not None
    assert str(made.placement.device_of("model.rotary_emb")) == "cuda:1"
