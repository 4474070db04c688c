"""The map report: its tree, its verdict, its schema."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.errors import PreflightRefused
from gptq_cli.jobs import dry_run, quantize
from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device_map import DeviceMap, MaxMemory
from gptq_cli.placement.placement import parse_inventory
from gptq_cli.planning.cases import Work
from gptq_cli.planning.time import Estimate
from gptq_cli.preflight.report import map_report, own_settings, placement_tree, quantize_plan
from gptq_cli.results.document import document
from gptq_cli.results.map import MapReport
from tests.documents import checked_document
from tests.preflight.shapes import BIG, GIB, SMALL_WORK, llama, resolved


def report(
    spec: str, facts: ModelFacts | None = None, devices: str = BIG, work: Work = SMALL_WORK
) -> MapReport:
    facts = facts or llama()
    made = resolved(spec, facts, devices, work=work)
    return map_report(
        facts,
        made,
        spec=DeviceMap.parse(spec),
        budgets=parse_inventory(devices),
        max_memory=MaxMemory.parse("0=20GiB"),
        given=True,
        plan=quantize_plan(facts, work, None),
    )


def rows(spec: str, facts: ModelFacts | None = None) -> list[tuple[int, str, str, int]]:
    facts = facts or llama()
    placement = resolved(spec, facts).placement
    assert placement is not None
    return [(r.depth, r.name, "+".join(r.devices), r.modules) for r in placement_tree(placement, facts)]


def test_tree_folds_equal_neighbours() -> None:
    assert rows("model.layers.0-3=0,model.layers.4-11=1,rest=0") == [
        (0, "model", "cuda:0+cuda:1", 1),
        (1, "embed_tokens", "cuda:0", 1),
        (1, "rotary_emb", "cuda:0", 1),
        (1, "layers", "cuda:0+cuda:1", 1),
        (2, "0-3", "cuda:0", 4),
        (2, "4-11", "cuda:1", 8),
        (1, "norm", "cuda:0", 1),
        (0, "lm_head", "cuda:0", 1),
    ]


def test_tree_of_one_device_still_shows_the_parts() -> None:
    found = rows("0")
    assert (2, "0-11", "cuda:0", 12) in found
    assert {device for _, _, device, _ in found} == {"cuda:0"}


def test_tree_folds_runs_not_sets() -> None:
    found = [(name, device) for depth, name, device, _ in rows("model.layers.5=1,rest=0") if depth == 2]
    assert found == [("0-4", "cuda:0"), ("5", "cuda:1"), ("6-11", "cuda:0")]


def test_tree_shows_inside_a_split_block() -> None:
    found = rows("model.layers.5.mlp=1,rest=0")
    assert (2, "5", "cuda:0+cuda:1", 1) in found
    assert (3, "mlp", "cuda:1", 1) in found


def test_tree_sizes_add_up() -> None:
    facts = llama()
    placement = resolved("model.layers.0-3=0,rest=1", facts).placement
    assert placement is not None
    tree = placement_tree(placement, facts)
    assert sum(row.size_bytes for row in tree if row.depth == 0) == facts.size_bytes
    assert sum(row.size_bytes for row in tree if row.leaf) == facts.size_bytes
    assert tree[-1].path == "lm_head"


@pytest.mark.parametrize(
    ("spec", "devices", "verdict"),
    [
        ("auto", BIG, "fits"),
        ("model.norm=cpu,rest=0", BIG, "fits with warnings"),
        ("disk", BIG, "refused"),
        ("lm_head=7", BIG, "refused"),
        ("auto", "cuda:0=512MiB,cpu=700MiB", "refused"),
        ("cpu", "cpu=64GiB", "fits"),
        ("mps", "mps=24GiB,cpu=24GiB", "fits"),
    ],
)
def test_verdict_and_schema(spec: str, devices: str, verdict: str) -> None:
    made = report(spec, devices=devices)
    assert made.verdict == verdict
    assert made.ok is (verdict != "refused")
    shown = checked_document(json.dumps(document(made)), "map_report")
    assert DeviceMap.parse(shown["spec"]) == DeviceMap.parse(spec)


def test_plan_of_a_dry_run() -> None:
    facts = llama(blocks=3, hidden=1024, inner=4096)
    plan = quantize_plan(facts, SMALL_WORK, Estimate(10.0, 10.0, {}, 0.5), 2.5)
    assert (plan.seconds, plan.writing_seconds) == (12.5, 2.5)
    assert [(s.blocks, s.example, s.linears) for s in plan.stages] == [
        (3, "model.layers.0", tuple((f"self_attn.{n}_proj", 1024, 1024) for n in "qkv")),
        (3, "model.layers.0", (("self_attn.o_proj", 1024, 1024),)),
        (3, "model.layers.0", (("mlp.gate_proj", 1024, 4096), ("mlp.up_proj", 1024, 4096))),
        (3, "model.layers.0", (("mlp.down_proj", 4096, 1024),)),
    ]
    weights = 3 * (4 * 1024**2 + 3 * 1024 * 4096)
    assert plan.quantized_share == weights / facts.parameters
    assert 4.125 < plan.bits_per_weight < 4.2
    assert plan.size_after_bytes < plan.size_before_bytes
    assert plan.seconds == 12.5


def test_dry_run_writes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = QuantizeJob(
        model=ModelRef(model=str(tiny_llama)),
        out=str(out),
        quantize=QuantizeConfig(group_size=32),
        calibration=CalibrationConfig(samples=4, seq_len=32),
        devices=parse_inventory("cuda:0=24GiB,cpu=8GiB"),
    )
    made = dry_run(job)
    assert made.plan is not None
    assert (made.plan.blocks, made.plan.linears) == (3, 21)
    assert made.devices[0].limit_bytes == 24 * GIB
    checked_document(json.dumps(document(made)), "map_report")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device_map", ["disk", "model.layers.1=disk,rest=cpu"])
def test_quantizing_with_disk_is_a_value_error_and_a_refusal(
    tiny_llama: Path, tmp_path: Path, device_map: str
) -> None:
    job = QuantizeJob(
        model=ModelRef(model=str(tiny_llama)),
        out=str(tmp_path / "out"),
        quantize=QuantizeConfig(group_size=32),
        calibration=CalibrationConfig(samples=4, seq_len=32),
        device_map=DeviceMap.parse(device_map),
    )
    with pytest.raises(ValueError, match=r"^disk offload is not supported with GPTQ quantization$") as caught:
        quantize(job)
    assert isinstance(caught.value, PreflightRefused)
    assert caught.value.exit_code == 3
    assert "disk-offload" in [f.rule for f in caught.value.report.findings]
    assert list(tmp_path.iterdir()) == []


def test_another_refusal_is_no_value_error(tiny_llama: Path, tmp_path: Path) -> None:
    job = QuantizeJob(
        model=ModelRef(model=str(tiny_llama)),
        out=str(tmp_path / "out"),
        quantize=QuantizeConfig(group_size=48),
        calibration=CalibrationConfig(samples=4, seq_len=32),
    )
    with pytest.raises(PreflightRefused, match="refused by preflight: 1 error") as caught:
        quantize(job)
    assert not isinstance(caught.value, ValueError)


def test_the_plan_says_which_group_auto_found() -> None:
    facts = llama(blocks=2, hidden=576, inner=1536)
    work = Work(QuantizeConfig(), CalibrationConfig(samples=4, seq_len=32))
    plan = quantize_plan(facts, work, None)
    assert (plan.group_size, plan.group_reason) == (
        64,
        "auto: the largest of 128, 64, 32 that divides every linear",
    )
    asked = quantize_plan(facts, Work(QuantizeConfig(group_size=64), work.calibration), None)
    assert asked == replace(plan, group_reason="")


@pytest.mark.parametrize("tied", [False, True])
def test_bits_a_parameter_count_everything_once(tied: bool) -> None:
    facts = llama(blocks=2, hidden=512, inner=1024, vocab=1000, tied=tied)
    plan = quantize_plan(facts, SMALL_WORK, None)
    dense = 1000 * 512 * (1 if tied else 2) + 3 * 512
    assert plan.bits_per_parameter == 8 * plan.size_after_bytes / facts.parameters
    weights = facts.parameters - dense
    assert plan.size_after_bytes * 8 == pytest.approx(plan.bits_per_weight * weights + 16 * dense)


def test_settings_by_module_are_named_with_the_blocks_that_have_them() -> None:
    rules = ["model.layers.0.mlp=bits:8", "model.layers.2-3.mlp.down_proj=bits:8", "*.*.*.self_attn=bits:3"]
    config = QuantizeConfig.of(bits=4, group_size=32, modules=rules)
    found = {one.name: (one.bits, one.linears) for one in own_settings(llama(blocks=5), config)}
    assert found["model.layers.0,2-3.mlp.down_proj"] == (8, 3)
    assert found["model.layers.0.mlp.gate_proj"] == (8, 1)
    assert found["model.layers.*.self_attn.q_proj"] == (3, 5)
    assert len(found) == 7
