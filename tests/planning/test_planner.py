"""Our own plans: what fits where, in which order of preference, and what is refused with which remedies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.device_map import STRATEGIES
from gptq_cli.placement.placement import Placement
from gptq_cli.planning.cases import Work
from gptq_cli.planning.memory import work_sets
from gptq_cli.planning.planner import fill, fill_evenly
from gptq_cli.planning.units import units_of
from gptq_cli.preflight.resolve import Resolution
from tests.planning.schedules import schedule
from tests.preflight.shapes import GIB, SMALL_WORK, llama, resolved, rules_of

MODEL = llama(blocks=32, hidden=4096, inner=11008)  # 12.6 GiB of weights
CUDA0, CUDA1 = Device("cuda", 0), Device("cuda", 1)


def placed(made: Resolution) -> Placement:
    assert made.placement is not None, made.report
    return made.placement


def blocks_on(placement: Placement, facts: ModelFacts, device: Device) -> int:
    return sum(1 for block in facts.blocks if placement.device_of(block) == device)


def test_one_accelerator_if_it_is_enough_the_roomier_one() -> None:
    placement = placed(resolved("auto", MODEL, "cuda:0=20GiB,cuda:1=24GiB,cpu=64GiB"))
    assert placement.devices == (CUDA1,)
    assert placement.reason == "everything on cuda:1: weights and work fit there"


def test_two_accelerators_evenly_if_one_is_not_enough() -> None:
    placement = placed(resolved("auto", MODEL, "cuda:0=12GiB,cuda:1=12GiB,cpu=64GiB"))
    assert placement.devices == (CUDA0, CUDA1)
    assert 14 <= blocks_on(placement, MODEL, CUDA0) <= 18
    assert "no single one is large enough" in placement.reason
    assert placement.main_device == CUDA0


def test_no_more_accelerators_than_needed() -> None:
    machine = "cuda:0=12GiB,cuda:1=12GiB,cuda:2=12GiB,cuda:3=12GiB,cpu=64GiB"
    assert len(placed(resolved("auto", MODEL, machine)).devices) == 2


def test_blocks_stay_on_the_accelerator_while_embeddings_or_head_can_go() -> None:
    facts = llama(blocks=8, hidden=2048, inner=5632, vocab=256_000)  # a GiB each for embedding and head
    replayed = schedule(facts, SMALL_WORK, parked=False)
    needed = max(s.total_bytes for s in work_sets(facts, SMALL_WORK, replayed).values())
    head = next(t.size_bytes for t in facts.tensors if t.name == "lm_head.weight")
    limit = int((facts.size_bytes + needed + 0.8 * GIB - head // 2) / 0.95)
    made = resolved("auto", facts, f"cuda:0={limit},cpu=64GiB")
    placement = placed(made)
    assert blocks_on(placement, facts, CUDA0) == 8
    assert len(placement.offloaded) == 1
    assert set(placement.offloaded) < {"lm_head", "model.embed_tokens"}
    assert "cpu-offload" in rules_of(made, "warning")


def test_then_as_few_blocks_as_possible_go_to_cpu_from_the_end() -> None:
    made = resolved("auto", MODEL, "cuda:0=12GiB,cpu=64GiB")
    placement = placed(made)
    on_cpu = [b for b in MODEL.blocks if placement.device_of(b) == CPU]
    assert on_cpu == list(MODEL.blocks[-len(on_cpu) :])
    assert 0 < len(on_cpu) < 16
    assert placement.main_device == CUDA0
    assert rules_of(made, "warning") == ["cpu-offload"]
    assert f"{32 - len(on_cpu)} of 32 blocks on cuda:0" in placement.reason
    fewer = resolved("auto", MODEL, "cuda:0=14GiB,cpu=64GiB")
    assert sum(placed(fewer).device_of(b) == CPU for b in MODEL.blocks) < len(on_cpu)


def test_a_spill_to_disk_is_refused_with_remedies_that_work() -> None:
    made = resolved("auto", MODEL, "cuda:0=6GiB,cpu=8GiB")
    assert made.placement is None
    assert rules_of(made) == ["disk-offload"]
    (finding,) = made.report.findings
    assert "auto would have to spill" in finding.message
    assert finding.size_bytes > 0
    assert "8 GiB more main memory" in finding.hint
    assert resolved("auto", MODEL, "cuda:0=6GiB,cpu=16GiB").placement is not None


def test_weights_that_would_fit_without_room_for_the_work() -> None:
    work = Work(QuantizeConfig(), CalibrationConfig(samples=4096, seq_len=2048))
    made = resolved("auto", MODEL, "cuda:0=60GiB,cpu=256GiB", work=work)
    assert rules_of(made) == ["no-plan-fits"]
    (finding,) = made.report.findings
    assert "--samples 1024 --batch-size 1" in finding.hint or "--samples 2048" in finding.hint
    assert len(finding.hint.split("; or ")) == 3
    less = Work(QuantizeConfig(), CalibrationConfig(samples=1024, seq_len=2048, batch_size=1))
    assert resolved("auto", MODEL, "cuda:0=60GiB,cpu=256GiB", work=less).placement is not None


def test_no_accelerator_is_a_plain_cpu_run() -> None:
    made = resolved("auto", MODEL, "cpu=64GiB")
    assert placed(made).devices == (CPU,)
    assert placed(made).reason == "everything on cpu: there is no accelerator"
    assert rules_of(made) == []


def test_no_accelerator_and_too_little_memory() -> None:
    made = resolved("auto", MODEL, "cpu=2GiB")
    assert rules_of(made) == ["memory-budget"]


def test_a_cpu_alone_needs_room_for_one_block_at_a_time() -> None:
    (plan,) = resolved("auto", MODEL, "cpu=8GiB").devices
    assert MODEL.size_bytes > 12 * GIB
    outside = sum(t.size_bytes for t in MODEL.tensors if ".layers." not in t.name)
    block = sum(t.size_bytes for t in MODEL.tensors if ".layers.0." in t.name)
    assert plan.weights_bytes == outside + block


def test_max_memory_is_obeyed() -> None:
    made = resolved("auto", MODEL, max_memory="0=8GiB,1=24GiB")
    assert placed(made).devices == (CUDA1,)
    made = resolved("auto", MODEL, max_memory="0=8GiB,1=0GiB,cpu=64GiB")
    assert placed(made).devices == (CUDA0, CPU)
    assert all(p.needed_bytes <= 8 * GIB for p in made.devices if p.device == "cuda:0")


def test_parked_forwards_only_where_they_fit() -> None:
    long = Work(QuantizeConfig(), CalibrationConfig(samples=128, seq_len=2048))
    for size, replayed in (("80GiB", None), ("20GiB", "memory")):
        made = resolved("auto", MODEL, f"cuda:0={size},cpu=64GiB", work=long).schedule
        assert made is not None
        assert {block.replayed for block in made.blocks} == {replayed}


def test_tied_head_follows_its_embedding() -> None:
    facts = llama(blocks=32, hidden=4096, inner=11008, tied=True)
    placement = placed(resolved("auto", facts, "cuda:0=12GiB,cuda:1=12GiB,cpu=64GiB"))
    assert placement.device_of("lm_head") == placement.device_of("model.embed_tokens")


@pytest.mark.parametrize("spec", ["balanced", "balanced_low_0", "sequential"])
def test_the_other_strategies(spec: str) -> None:
    machine = "cuda:0=24GiB,cuda:1=24GiB,cpu=64GiB"
    placement = placed(resolved(spec, MODEL, machine))
    assert placement.reason.startswith(spec)
    first = blocks_on(placement, MODEL, CUDA0)
    if spec == "balanced":
        assert 14 <= first <= 18
    elif spec == "balanced_low_0":
        assert first == 0
        assert placement.main_device == CUDA1
    else:
        assert first == 32


def test_balanced_low_0_uses_the_first_one_when_it_must() -> None:
    placement = placed(resolved("balanced_low_0", MODEL, "cuda:0=12GiB,cuda:1=12GiB,cpu=64GiB"))
    assert 0 < blocks_on(placement, MODEL, CUDA0) < blocks_on(placement, MODEL, CUDA1)


def test_sequential_spills_to_cpu() -> None:
    made = resolved("sequential", MODEL, "cuda:0=12GiB,cpu=64GiB")
    assert placed(made).devices == (CUDA0, CPU)
    assert "cpu-offload" in rules_of(made)


def test_plans_keep_five_percent_where_they_can() -> None:
    made = resolved("auto", MODEL, "cuda:0=12GiB,cpu=64GiB")
    assert all(p.needed_bytes <= 0.95 * p.limit_bytes for p in made.devices)


def test_fill_never_goes_back() -> None:
    units = units_of(llama(blocks=3))
    assigned = fill(units, [(CUDA0, 80_000_000), (CUDA1, 10**9)])
    assert assigned is not None
    order = [assigned[unit.name] for unit in units]
    assert order == sorted(order)
    assert fill(units, [(CUDA0, 1000)]) is None
    even = fill_evenly(units, [(CUDA0, 10**9), (CUDA1, 10**9)])
    assert even is not None
    assert len(set(even.values())) == 2


machines = st.lists(st.integers(2, 30), min_size=0, max_size=4).flatmap(
    lambda cards: st.integers(1, 64).map(
        lambda cpu: ",".join([*(f"cuda:{i}={size}GiB" for i, size in enumerate(cards)), f"cpu={cpu}GiB"])
    )
)


@settings(max_examples=60, deadline=None)
@given(machines, st.sampled_from(STRATEGIES), st.booleans())
def test_every_plan_covers_everything_once_and_fits(machine: str, spec: str, tied: bool) -> None:
    facts = llama(blocks=16, hidden=4096, inner=11008, tied=tied)
    made = resolved(spec, facts, machine)
    if made.placement is None:
        assert not made.report.ok
        return
    names = [t.name for t in facts.tensors] + [n for group in facts.tied for n in group]
    for name in names:
        made.placement.device_of(name)
    assert sum(size for _, size in made.placement.size_bytes) == facts.size_bytes
    entries = [entry.name for entry in made.placement.entries]
    assert len(entries) == len(set(entries))
    assert not any(b.startswith(a + ".") for a in entries for b in entries if a)
    if made.report.ok:
        assert all(plan.fits for plan in made.devices)
    assert not {"block-split", "tied-split", "device-absent"} & set(rules_of(made))


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 40))
def test_more_memory_never_means_more_on_cpu(size: int) -> None:
    def offloaded(gib: int) -> int:
        made = resolved("auto", MODEL, f"cuda:0={gib}GiB,cpu=64GiB")
        return len(made.placement.offloaded) if made.placement else 99

    assert offloaded(size + 2) <= offloaded(size)


def test_an_unusual_dtype_counts() -> None:
    wide = llama(blocks=32, hidden=4096, inner=11008, dtype="float32")
    made = resolved("auto", wide, "cuda:0=18GiB,cpu=8GiB")
    assert made.placement is None
    assert "--dtype bfloat16" in made.report.findings[0].hint
    assert replace(wide, dtype="bfloat16").dtype_bytes == 2


def test_an_offload_that_less_work_would_avoid_says_so() -> None:
    work = Work(QuantizeConfig(solve_for="dense"), CalibrationConfig(samples=128, seq_len=2048))
    own = resolved("auto", MODEL, "cuda:0=19GiB,cpu=64GiB", work=work)
    (finding,) = [f for f in own.report.findings if f.rule == "cpu-offload"]
    assert finding.hint == "--solve-for own (a little less accurate) keeps everything on accelerators"
    plain = resolved("auto", MODEL, "cuda:0=12GiB,cpu=64GiB", work=work)
    (finding,) = [f for f in plain.report.findings if f.rule == "cpu-offload"]
    assert "keeps everything" not in finding.hint


@pytest.mark.parametrize("strategy", ["auto", "balanced", "balanced_low_0", "sequential"])
@pytest.mark.parametrize(
    ("limits", "used"),
    [
        ("0=24GiB,cpu=20GiB", (CUDA0,)),
        ("1=24GiB", (CUDA1,)),
        ("0=8GiB,1=24GiB", None),
        ("cpu=40GiB", (CPU,)),
    ],
)
def test_only_devices_that_max_memory_lists_are_used(
    strategy: str, limits: str, used: tuple[Device, ...] | None
) -> None:
    """As accelerate: `infer_auto_device_map` walks the keys of max_memory, and no other device."""
    made = resolved(strategy, MODEL, "cuda:0=24GiB,cuda:1=24GiB,cuda:2=24GiB,cpu=64GiB", max_memory=limits)
    listed = {Device.parse(part.partition("=")[0]) for part in limits.split(",")}
    devices = placed(made).devices
    assert set(devices) <= listed
    assert used is None or devices == used
    assert "max-memory-unlisted" in [f.rule for f in made.report.findings]
    if devices == (CPU,):
        assert placed(made).reason == "everything on cpu: --max-memory leaves no accelerator"


@pytest.mark.parametrize("strategy", ["auto", "balanced", "sequential"])
def test_without_cpu_in_max_memory_nothing_is_offloaded(strategy: str) -> None:
    made = resolved(strategy, MODEL, "cuda:0=8GiB,cpu=64GiB", max_memory="0=8GiB")
    assert made.placement is None
    (finding,) = [f for f in made.report.findings if f.level == "error"]
    assert finding.rule == "disk-offload"
    assert '--max-memory "cuda:0=8GiB,cpu=64GiB" (uses cpu, too)' in finding.hint
    wider = resolved(strategy, MODEL, "cuda:0=8GiB,cpu=64GiB", max_memory="0=8GiB,cpu=64GiB")
    assert placed(wider).devices == (CUDA0, CPU)


def test_nothing_listed_that_is_there() -> None:
    made = resolved("auto", MODEL, max_memory="0=0GiB")
    assert (made.placement, made.report.findings[0].rule) == (None, "no-plan-fits")
