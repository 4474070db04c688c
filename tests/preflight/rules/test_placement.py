"""Each rule about a finished placement."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from gptq_cli.model.facts import ModelFacts
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


def shared_blocks() -> ModelFacts:
    """As Zamba: the MLP of block 2 is that of blocks 5 and 8 as well."""
    base, first = llama(), "model.layers.2.mlp."
    later = ("model.layers.5.mlp.", "model.layers.8.mlp.")
    named = [tensor.name for tensor in base.tensors if tensor.name.startswith(first)]
    tied = tuple((name, *(name.replace(first, other) for other in later)) for name in named)
    again = {name for group in tied for name in group[1:]}
    return replace(base, tied=tied, tensors=tuple(t for t in base.tensors if t.name not in again))


def test_a_shared_module_on_several_devices_is_one_error() -> None:
    made = resolved("model.layers.0-3=0,model.layers.4-7=1,rest=0", shared_blocks())
    (finding,) = [f for f in made.report.findings if f.rule == "tied-split"]
    assert finding.message == (
        "model.layers.2 and model.layers.5 and model.layers.8 share 3 tensors, but the device map has "
        "model.layers.2 on cuda:0 and model.layers.5 on cuda:1 and model.layers.8 on cuda:0"
    )


HINTED = re.compile('--device-map "([^"]*)"')


@pytest.mark.parametrize(
    ("spec", "facts", "fewer"),
    [
        ("model.layers.*=1,model.layers.[02468]=0,rest=0", llama(), 1),
        ("model.layers.*=1,model.layers.[02468]=0,rest=disk", llama(), 1),
        ("model.layers.*=1,model.layers.[02468]=0,lm_head=1,rest=0", llama(tied=True), 1),
        ("model.layers.[02468]=0,model.layers.5=0,rest=1", shared_blocks(), 3),
        ("model.layers.0-1=2,model.layers.2=0,model.layers.3=1,rest=0", llama(), 1),
        ("model.layers.[024]=1,model.layers.9=1,rest=0", shared_blocks(), 3),
    ],
)
def test_the_map_with_one_run_for_each_device_can_be_followed(
    spec: str, facts: ModelFacts, fewer: int
) -> None:
    """No rule refuses it, and it changes devices as often as is said."""
    (finding,) = [f for f in resolved(spec, facts).report.findings if f.rule == "block-order"]
    assert f"; {fewer} would do" in finding.message
    found = HINTED.search(finding.hint)
    assert found is not None
    followed = resolved(found[1], facts)
    assert followed.report.ok
    assert set(rules_of(followed, "warning")) <= {"cpu-offload"}, "what was on disk"


def test_blocks_that_must_lie_together_and_own_plans_are_not_out_of_order() -> None:
    """Where the tie decides, no map changes devices less often; and a plan of our own offers none."""
    facts = shared_blocks()
    assert "block-order" not in rules_of(resolved("model.layers.0-5=0,model.layers.8=0,rest=1", facts))
    assert "block-order" not in rules_of(resolved("balanced", facts))


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
