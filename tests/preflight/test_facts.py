"""Facts from real skeletons: stages and execution order traced without data, for every tiny architecture."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gptq_cli.config import ModelRef
from gptq_cli.model import skeleton as skeleton_module
from gptq_cli.model.describe import model_facts
from gptq_cli.model.find import find_model
from gptq_cli.model.skeleton import Skeleton, open_skeleton
from gptq_cli.model.trace import trace
from gptq_cli.planning.units import units_of
from gptq_cli.preflight.facts import environment_facts
from tests import architectures
from tests.fabricated import apparent_bytes, config_70b, fabricate
from tests.second_opinion import save_source
from tests.tiny import TINY

Tiny = Callable[..., Path]

STAGES = {
    "llama": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
              ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    "phi3": (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    "gpt2": (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    "opt": (("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"), ("self_attn.out_proj",),
            ("fc1",), ("fc2",)),
    "falcon": (("self_attention.query_key_value", "mlp.dense_h_to_4h"), ("self_attention.dense",),
               ("mlp.dense_4h_to_h",)),
}  # fmt: skip


def skeleton_of(path: Path) -> Skeleton:
    ref = ModelRef(model=str(path))
    return open_skeleton(find_model(ref), ref)


@pytest.mark.parametrize("name", TINY)
def test_facts_of_every_architecture(tiny: Tiny, name: str) -> None:
    skeleton = skeleton_of(tiny(name))
    facts = model_facts(skeleton)
    assert facts.order, "the trace fell back"
    assert facts.parameters == skeleton.parameters
    assert facts.size_bytes == sum(
        t.numel() * t.element_size() for t in (*skeleton.model.parameters(), *skeleton.model.buffers())
    )
    assert [x.name for x in facts.linears] == [x.name for x in skeleton.linears]
    assert facts.hidden_size == 64
    units = units_of(facts)
    assert [unit.name for unit in units if unit.block] == list(facts.blocks)
    assert units[-1].name == "lm_head"
    assert "embed" in units[0].name or "wte" in units[0].name
    for block in facts.blocks:
        numbers = {x.stage for x in facts.linears if x.block == block}
        assert numbers == set(range(len(numbers)))


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_the_linears_that_read_one_tensor(tiny: Tiny, name: str) -> None:
    facts = model_facts(skeleton_of(tiny(name)))
    block = facts.blocks[-1]
    grouped: dict[int, tuple[str, ...]] = {}
    for linear in facts.linears:
        if linear.block == block:
            grouped[linear.stage] = (*grouped.get(linear.stage, ()), linear.name.removeprefix(f"{block}."))
    assert tuple(grouped[number] for number in sorted(grouped)) == STAGES[name]


def test_execution_order_is_not_registration_order(tiny: Tiny) -> None:
    """OPT registers its final norm before its blocks."""
    facts = model_facts(skeleton_of(tiny("opt")))
    names = [unit.name for unit in units_of(facts)]
    assert names.index("model.decoder.final_layer_norm") > names.index("model.decoder.layers.1")
    registered = [t.name for t in facts.tensors]
    assert registered.index("model.decoder.final_layer_norm.weight") < registered.index(
        "model.decoder.layers.0.fc1.weight"
    )


def test_tied_and_fused(tiny: Tiny) -> None:
    assert model_facts(skeleton_of(tiny("llama_tied"))).tied == (
        ("model.embed_tokens.weight", "lm_head.weight"),
    )
    moe = model_facts(skeleton_of(tiny("qwen3_moe")))
    assert moe.fused == ()
    routed = [linear.name for linear in moe.linears if linear.routed]
    assert len(routed) == 3 * 4
    assert routed[:3] == [f"model.layers.1.mlp.experts.0.{role}_proj" for role in ("gate", "up", "down")]
    assert "model.layers.1.mlp.experts" in moe.modules
    below = [name for name in moe.modules if "experts." in name]
    assert below == ["model.layers.1.mlp.experts.act_fn"], "linears of experts have no tensors to place"
    assert "model.layers.1.mlp.experts.down_proj" in {tensor.name for tensor in moe.tensors}


def test_names_in_the_files_and_rows_that_alternate(tmp_path: Path, tiny: Tiny) -> None:
    experts = [x for x in model_facts(skeleton_of(tiny("mixtral"))).linears if x.part_of]
    assert {x.source_name.rpartition(".")[2] for x in experts} == {"w1", "w2", "w3"}
    assert not any(x.interleaved for x in experts)
    source = save_source(architectures.build("gpt_oss"), tmp_path)
    linears = model_facts(skeleton_of(source)).linears
    assert {x.name.rpartition(".")[2] for x in linears if x.interleaved} == {"gate_proj", "up_proj"}
    assert {x.name.rpartition(".")[2] for x in linears if x.part_of and not x.interleaved} == {"down_proj"}


def test_a_model_that_cannot_be_traced_has_stages_by_shape(tiny: Tiny) -> None:
    skeleton = skeleton_of(tiny("qwen3"))
    stopped = replace(skeleton.trace, stages=(), problem="in model.norm: RuntimeError: data needed")
    facts = model_facts(replace(skeleton, trace=stopped))
    assert (facts.order, facts.untraced) == ((), stopped.problem)
    assert not any(linear.routed for linear in facts.linears)
    stages = {linear.name: linear.stage for linear in facts.linears}
    names = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")
    assert [stages[f"model.layers.0.{name}"] for name in names] == [0, 0, 1]


def test_the_model_is_traced_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[object] = []
    monkeypatch.setattr(skeleton_module, "trace", lambda *words: runs.append(words) or trace(*words))
    skeleton = skeleton_of(tiny("llama"))
    model_facts(skeleton)
    assert len(runs) == 1


def test_trace_leaves_no_hook(tiny: Tiny) -> None:
    skeleton = skeleton_of(tiny("llama"))
    model_facts(skeleton)
    assert not any(module._forward_pre_hooks for module in skeleton.model.modules())
    assert all(p.is_meta for p in skeleton.model.parameters())


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "ASCEND_RT_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = environment_facts()
    assert (found.local_rank, found.visible) == (None, (("CUDA_VISIBLE_DEVICES", ""),))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert environment_facts().local_rank == "1"
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert environment_facts().local_rank is None, "the ranks have met"


SCRIPT = """
import sys, time
import torch, transformers
from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig
from gptq_cli.devices.host_memory import peak_resident_bytes
from gptq_cli.model.skeleton import open_skeleton
from gptq_cli.model.describe import model_facts
from gptq_cli.model.find import find_model
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.placement.placement import parse_inventory
from gptq_cli.planning.cases import Work
from gptq_cli.preflight.resolve import resolve

ref = ModelRef(model=sys.argv[1])
facts = model_facts(open_skeleton(find_model(ref), ref))
machine = parse_inventory("cuda:0=80GiB,cpu=256GiB")
work = Work(QuantizeConfig(), CalibrationConfig())
made = resolve(DeviceMap.parse("auto"), facts, machine, work=work, given=True)
print(facts.parameters, made.report.ok, peak_resident_bytes())
"""


def test_70b_resolves_from_heads_alone_in_less_than_a_gibibyte(tmp_path: Path) -> None:
    path = fabricate(config_70b(), tmp_path / "70b")
    assert apparent_bytes(path) > 140e9
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=True, timeout=300
    )
    parameters, ok, peak = result.stdout.split()
    assert (int(parameters), ok) == (70_553_706_496, "True")
    assert int(peak) < 1 << 30
