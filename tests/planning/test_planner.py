"""Our own plans: what fits where, in which order of preference, and what is refused with which remedies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.device_map import STRATEGIES
from gptq_cli.placement.placement import Placement
from gptq_cli.planning.cases import Work
from gptq_cli.preflight.resolve import Resolution
from tests.preflight.shapes import GIB, llama, resolved, rules_of

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
    in_turn = "each block is read from the files when its turn comes"
    assert placement.reason == f"everything on cuda:1; {in_turn}"


def test_a_model_may_be_larger_than_its_accelerator() -> None:
    made = resolved("auto", MODEL, "cuda:0=4GiB,cpu=8GiB")
    assert placed(made).devices == (CUDA0,)
    cuda, host = made.devices
    block = sum(t.size_bytes for t in MODEL.tensors if ".layers.0." in t.name)
    assert MODEL.size_bytes > 12 * GIB > cuda.limit_bytes
    assert cuda.weights_bytes == block
    assert block <= host.ahead_bytes < block + 64 * 2**20
    assert made.report.ok


def with_head(facts: ModelFacts) -> ModelFacts:
    """The same model with its head quantized, so that what lies outside the blocks stays in memory."""
    hidden, vocab = facts.hidden_size, facts.vocab_size
    head = LinearFact(name="lm_head", block="", in_features=hidden, out_features=vocab)
    return replace(facts, head=head, uncalled=frozenset())


WIDE = with_head(llama(blocks=8, hidden=2048, inner=5632, vocab=512_000))  # 2 GiB each for embedding and head


def test_two_accelerators_if_one_has_no_room_for_what_lies_outside() -> None:
    both, one = "cuda:0=4.5GiB,cuda:1=4.5GiB,cpu=64GiB", "cuda:0=8GiB,cuda:1=8GiB,cpu=64GiB"
    assert placed(resolved("auto", WIDE, one)).devices == (CUDA0,)
    placement = placed(resolved("auto", WIDE, both))
    assert placement.devices == (CUDA0, CUDA1)
    assert "no single one has room for all of it" in placement.reason
    assert placement.device_of("model.embed_tokens") == CUDA0
    assert placement.device_of("lm_head") == CUDA1
    assert blocks_on(placement, WIDE, CUDA0) == blocks_on(placement, WIDE, CUDA1) == 4
    assert placement.main_device == CUDA0


def test_no_more_accelerators_than_needed() -> None:
    machine = "cuda:0=4.5GiB,cuda:1=4.5GiB,cuda:2=4.5GiB,cuda:3=4.5GiB,cpu=64GiB"
    assert len(placed(resolved("auto", WIDE, machine)).devices) == 2


def test_a_small_accelerator_beside_a_large_one_takes_what_lies_outside() -> None:
    placement = placed(resolved("auto", WIDE, "cuda:0=4.5GiB,cuda:1=3GiB,cpu=64GiB"))
    assert blocks_on(placement, WIDE, CUDA0) == 8
    assert CUDA1 in {placement.device_of("lm_head"), placement.device_of("model.embed_tokens")}


def test_embedding_or_head_on_cpu_while_the_blocks_stay_on_the_accelerator() -> None:
    made = resolved("auto", WIDE, "cuda:0=5GiB,cpu=64GiB")
    placement = placed(made)
    assert blocks_on(placement, WIDE, CUDA0) == 8
    assert len(placement.offloaded) == 1
    assert set(placement.offloaded) < {"lm_head", "model.embed_tokens"}
    assert rules_of(made, "warning") == ["cpu-offload"]
    assert "on cpu: together they do not fit" in placement.reason


def test_no_plan_has_blocks_that_rest_on_the_cpu() -> None:
    """Blocks that rest in the files need less of both; a map that asks for it is obeyed."""
    for size in (3, 4, 6, 8, 12):
        made = resolved("auto", MODEL, f"cuda:0={size}GiB,cpu=64GiB")
        assert blocks_on(placed(made), MODEL, CPU) == 0
    asked = resolved("model.layers.16-31=cpu,rest=0", MODEL, "cuda:0=12GiB,cpu=64GiB")
    assert blocks_on(placed(asked), MODEL, CPU) == 16
    assert rules_of(asked, "warning") == ["cpu-offload"]
    host = asked.devices[-1]
    assert host.weights_bytes == sum(t.size_bytes for t in MODEL.tensors if _late(t.name))


def _late(name: str) -> bool:
    return any(name.startswith(f"model.layers.{index}.") for index in range(16, 32))


def test_a_refusal_comes_with_remedies_that_work() -> None:
    made = resolved("auto", MODEL, "cuda:0=3GiB,cpu=600MiB")
    assert made.placement is None
    assert rules_of(made) == ["no-plan-fits"]
    (finding,) = made.report.findings
    assert "8 GiB more main memory" in finding.hint
    assert resolved("auto", MODEL, "cuda:0=3GiB,cpu=9GiB").placement is not None


def test_weights_that_would_fit_without_room_for_the_work() -> None:
    work = Work(QuantizeConfig(), CalibrationConfig(samples=32768, seq_len=2048))
    made = resolved("auto", MODEL, "cuda:0=60GiB,cpu=256GiB", work=work)
    assert rules_of(made) == ["no-plan-fits"]
    (finding,) = made.report.findings
    assert "--samples 8192 --batch-size 1" in finding.hint
    less = Work(QuantizeConfig(solve_for="own"), CalibrationConfig(samples=8192, seq_len=2048, batch_size=1))
    assert resolved("auto", MODEL, "cuda:0=60GiB,cpu=256GiB", work=less).placement is not None


def test_hidden_states_rest_where_there_is_room() -> None:
    long = Work(QuantizeConfig(), CalibrationConfig(samples=128, seq_len=2048))
    for size, on_host in (("80GiB", False), ("12GiB", False), ("6GiB", True)):
        made = resolved("auto", MODEL, f"cuda:0={size},cpu=64GiB", work=long)
        assert made.schedule is not None
        assert {block.activations_on_host for block in made.schedule.blocks} == {on_host}
        cuda, host = made.devices
        resting, other = (host, cuda) if on_host else (cuda, host)
        assert resting.activation_bytes >= 128 * 2048 * 4096 * 2
        assert other.activation_bytes == 0


def test_the_next_block_is_read_ahead_where_main_memory_has_room() -> None:
    for size, ahead in (("8GiB", True), ("2.75GiB", False)):
        made = resolved("cpu", MODEL, f"cpu={size}")
        assert made.schedule is not None
        assert made.schedule.reads_ahead == ahead
        (plan,) = made.devices
        assert bool(plan.ahead_bytes) == ahead


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
    block = sum(t.size_bytes for t in MODEL.tensors if ".layers.0." in t.name)
    assert (plan.weights_bytes, plan.ahead_bytes) == (block, block), "the embedding has left by then"


def test_max_memory_is_obeyed() -> None:
    made = resolved("auto", MODEL, max_memory="0=2GiB,1=24GiB")
    assert placed(made).devices == (CUDA1,)
    made = resolved("auto", MODEL, max_memory="0=4GiB,1=0GiB,cpu=64GiB")
    assert placed(made).devices == (CUDA0,)
    assert all(p.needed_bytes <= 4 * GIB for p in made.devices if p.device == "cuda:0")


def test_parked_forwards_only_where_they_fit() -> None:
    long = Work(QuantizeConfig(), CalibrationConfig(samples=128, seq_len=2048))
    for size, replayed in (("80GiB", None), ("12GiB", "memory")):
        made = resolved("auto", MODEL, f"cuda:0={size},cpu=64GiB", work=long).schedule
        assert made is not None
        assert {block.replayed for block in made.blocks} == {replayed}


def test_tied_head_follows_its_embedding() -> None:
    facts = llama(blocks=32, hidden=4096, inner=11008, tied=True)
    placement = placed(resolved("balanced", facts, "cuda:0=12GiB,cuda:1=12GiB,cpu=64GiB"))
    assert placement.devices == (CUDA0, CUDA1)
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


def test_sequential_takes_the_first_that_can_do_the_work() -> None:
    placement = placed(resolved("sequential", MODEL, "cuda:0=2GiB,cuda:1=4GiB,cuda:2=24GiB,cpu=64GiB"))
    assert placement.devices == (CUDA1,)


def test_balanced_leaves_out_what_has_no_room_for_a_block() -> None:
    placement = placed(resolved("balanced", MODEL, "cuda:0=2GiB,cuda:1=12GiB,cuda:2=12GiB,cpu=64GiB"))
    assert placement.devices == (CUDA1, Device("cuda", 2))


def test_plans_keep_five_percent_where_they_can() -> None:
    made = resolved("auto", MODEL, "cuda:0=12GiB,cpu=64GiB")
    assert all(p.needed_bytes <= 0.95 * p.limit_bytes for p in made.devices)


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
@given(st.integers(3, 12))
def test_more_memory_never_means_more_on_cpu(size: int) -> None:
    def offloaded(gib: int) -> int:
        made = resolved("auto", WIDE, f"cuda:0={gib}GiB,cpu=64GiB")
        return len(made.placement.offloaded) if made.placement else 99

    assert offloaded(size + 2) <= offloaded(size)


def test_an_unusual_dtype_counts() -> None:
    shape = {"blocks": 32, "hidden": 4096, "inner": 11008}
    narrow, wide = llama(**shape), llama(**shape, dtype="float32")
    plans = [resolved("0", facts, "cuda:0=80GiB,cpu=64GiB").devices[0] for facts in (narrow, wide)]
    sizes = [plan.weights_bytes for plan in plans]
    assert sizes[1] == 2 * sizes[0]
    made = resolved("auto", wide, "cuda:0=2GiB,cpu=64GiB")
    assert made.placement is None
    assert replace(wide, dtype="bfloat16").dtype_bytes == 2


def test_an_offload_that_less_work_would_avoid_says_so() -> None:
    facts = with_head(llama(blocks=8, hidden=2048, inner=16384, vocab=256_000))
    config = QuantizeConfig(solve_for="dense", group_size=128)
    work = Work(config, CalibrationConfig(samples=128, seq_len=2048))
    own = resolved("auto", facts, "cuda:0=7.5GiB,cpu=64GiB", work=work)
    (finding,) = [f for f in own.report.findings if f.rule == "cpu-offload"]
    assert finding.hint == "--solve-for own (less accurate) keeps everything on accelerators"
    plain = resolved("auto", WIDE, "cuda:0=5GiB,cpu=64GiB", work=work)
    (finding,) = [f for f in plain.report.findings if f.rule == "cpu-offload"]
    assert "keeps everything" not in finding.hint


@pytest.mark.parametrize("strategy", ["auto", "balanced", "balanced_low_0", "sequential"])
@pytest.mark.parametrize(
    ("limits", "used"),
    [
        ("0=24GiB,cpu=20GiB", (CUDA0,)),
        ("1=24GiB", (CUDA1,)),
        ("0=2GiB,1=24GiB", None),
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
    machine = "cuda:0=4.5GiB,cpu=64GiB"
    made = resolved(strategy, WIDE, machine, max_memory="0=4.5GiB")
    assert made.placement is None
    (finding,) = [f for f in made.report.findings if f.level == "error"]
    assert finding.rule == "no-plan-fits"
    assert '--max-memory "cuda:0=4608MiB,cpu=64GiB" (uses cpu, too)' in finding.hint
    wider = resolved(strategy, WIDE, machine, max_memory="0=4608MiB,cpu=64GiB")
    assert placed(wider).devices == (CUDA0, CPU)


def test_nothing_listed_that_is_there() -> None:
    made = resolved("auto", MODEL, max_memory="0=0GiB")
    assert (made.placement, made.report.findings[0].rule) == (None, "no-plan-fits")
