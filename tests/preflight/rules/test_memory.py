"""Rules about bytes, and the remedies they name: every remedy is tried before it is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptq_cli.config import CalibrationConfig, QuantizeConfig
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.placement.placement import parse_inventory
from gptq_cli.planning.cases import Work
from gptq_cli.planning.remedies import cheapest
from gptq_cli.planning.schedule import micro_batch_samples
from gptq_cli.preflight.resolve import refusal, resolve
from tests.preflight.shapes import GIB, SMALL_WORK, case, llama, resolved, rules_of

MODEL = llama(blocks=32, hidden=4096, inner=11008)  # 12.6 GiB of weights


def test_budget_of_a_map_that_does_not_fit() -> None:
    """One block, its work, and the next one in main memory: the least that there is."""
    made = resolved("0", MODEL, "cuda:0=2GiB,cuda:1=12GiB,cpu=64GiB")
    (finding,) = [f for f in made.report.findings if f.rule == "memory-budget"]
    assert (finding.level, finding.subject) == ("error", "cuda:0")
    assert "may use 2.00 GiB: weights 386 MiB, " in finding.message
    assert finding.hint.startswith("--device-map auto")
    (plan,) = [p for p in made.devices if p.device == "cuda:0"]
    assert finding.size_bytes == plan.needed_bytes - 2 * GIB > 0


def test_budget_obeys_max_memory() -> None:
    assert rules_of(resolved("0", MODEL)) == []
    made = resolved("0", MODEL, max_memory="0=2GiB")
    assert rules_of(made) == ["memory-budget", "max-memory-unlisted"]
    assert made.report.findings[0].hint.startswith("leave --max-memory out")


@pytest.mark.parametrize("spec", ["auto", "balanced", "sequential", "cpu", "rest=1,lm_head=cpu"])
@pytest.mark.parametrize("max_memory", [None, "0=24GiB", "cpu=1MiB"])
def test_what_does_not_fit_is_an_error(spec: str, max_memory: str | None) -> None:
    """No plan says of a device that it does not fit while the verdict says that all fits."""
    model = llama(blocks=2, hidden=128, inner=256, vocab=512)
    for devices in ("0=0", "0=0,1=0", "0=0,cpu=64GiB", "0=24GiB", "0=1MiB,1=1MiB", "cpu=0", "0=24GiB,cpu=0"):
        made = resolved(spec, model, devices, max_memory=max_memory)
        sound = made.placement is not None and all(plan.fits for plan in made.devices)
        assert sound or not made.report.ok, devices


def test_a_cpu_that_is_not_in_devices_holds_nothing() -> None:
    """As with --max-memory: nothing is placed on what is not listed, and the words name the right option."""
    options = {
        ("0=0", None): "--devices",
        ("0=0", "0=1GiB"): "--devices",
        ("0=24GiB", "cpu=64GiB"): "--max-memory",
        ("cpu=64GiB", "0=1GiB"): "--max-memory",
    }
    for (devices, max_memory), option in options.items():
        findings = resolved("auto", MODEL, devices, max_memory=max_memory).report.findings
        (finding,) = [f for f in findings if f.rule == "no-plan-fits"]
        assert finding.level == "error"
        assert finding.message == f"no plan fits: {option} lists no device that can hold the model"
    reasons = {
        ("0=0,cpu=64GiB", None): "everything on cpu: no accelerator has free memory",
        ("0=24GiB,cpu=64GiB", "cpu=64GiB"): "everything on cpu: --max-memory leaves no accelerator",
        ("cpu=64GiB", None): "everything on cpu: there is no accelerator",
    }
    for (devices, max_memory), reason in reasons.items():
        placement = resolved("auto", MODEL, devices, max_memory=max_memory).placement
        assert placement is not None
        assert placement.reason == reason


def test_without_work_only_weights_count() -> None:
    """Loading has all weights in memory; quantizing one block at a time."""
    assert rules_of(resolved("0", MODEL, "cuda:0=12GiB,cpu=64GiB"), "error") == []
    loading = resolved("0", MODEL, "cuda:0=14GiB,cpu=64GiB", work=None)
    assert rules_of(loading, "error") == []
    plan = loading.devices[0]
    assert plan.working_bytes == plan.hessian_bytes == plan.activation_bytes == plan.packing_bytes == 0
    assert plan.weights_bytes == MODEL.size_bytes
    assert rules_of(resolved("0", MODEL, "cuda:0=12GiB,cpu=64GiB", work=None), "error") == ["memory-budget"]


def test_tight() -> None:
    """With the smallest micro-batch; a wider one is never what makes it tight."""
    data = replace(SMALL_WORK.calibration, batch_size=micro_batch_samples(SMALL_WORK))
    work = replace(SMALL_WORK, calibration=data)
    needed = resolved("0", MODEL, "cuda:0=1GiB,cpu=64GiB", work=work).devices[0].needed_bytes
    made = resolved("0", MODEL, f"cuda:0={needed * 101 // 100},cpu=64GiB", work=SMALL_WORK)
    assert rules_of(made) == ["memory-tight"]
    assert made.report.ok
    assert rules_of(resolved("0", MODEL, f"cuda:0={needed * 11 // 10},cpu=64GiB")) == []


def test_disk_in_a_map_is_replaced_by_the_first_device_that_can_take_it() -> None:
    made = resolved("model.layers.31=disk,rest=0", MODEL)
    (finding,) = [f for f in made.report.findings if f.level == "error"]
    assert finding.rule == "disk-offload"
    assert finding.message == "disk offload is not supported with GPTQ quantization"
    assert finding.modules == ("model.layers.31",)
    assert finding.size_bytes == sum(
        t.size_bytes for t in MODEL.tensors if t.name.startswith("model.layers.31.")
    )
    anyway = "(weights are read from the files anyway: leave disk out)"
    assert finding.hint == f'--device-map "model.layers.31=cuda:0,rest=cuda:0" {anyway}'
    loading = resolved("model.layers.31=disk,rest=0", MODEL, work=None)
    (finding,) = [f for f in loading.report.findings if f.rule == "disk-offload"]
    assert finding.hint == '--device-map "model.layers.31=cuda:0,rest=cuda:0"', "not so for loading"


def test_disk_goes_to_cpu_where_accelerators_are_full() -> None:
    made = resolved("model.layers.16-31=disk,rest=0", MODEL, "cuda:0=12GiB,cpu=64GiB", work=None)
    (finding,) = [f for f in made.report.findings if f.rule == "disk-offload"]
    assert finding.hint == '--device-map "model.layers.16-31=cpu,rest=cuda:0"'


def test_disk_as_the_whole_map() -> None:
    made = resolved("disk", MODEL)
    assert "disk-offload" in rules_of(made, "error")
    assert made.placement is not None
    with pytest.raises(ValueError, match=r"^disk offload is not supported with GPTQ quantization$"):
        raise refusal(made.report)


def test_other_errors_are_no_value_error() -> None:
    made = resolved("cuda:7", MODEL)
    assert not made.report.ok
    assert not isinstance(refusal(made.report), ValueError)


@pytest.mark.parametrize("strategy", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_strategy_without_room_for_the_work(strategy: str) -> None:
    made = resolved(strategy, MODEL, "cuda:0=2GiB,cuda:1=2GiB,cpu=4GiB")
    (finding,) = made.report.findings
    assert finding.rule == "no-plan-fits"
    assert "lacks" in finding.message
    assert finding.hint.startswith("--device-map cpu (no accelerator: many times slower)")


@pytest.mark.parametrize(
    ("spec", "devices", "max_memory", "samples"),
    [
        ("0", "cuda:0=4GiB,cpu=64GiB", None, 32),
        ("0", "cuda:0=24GiB,cpu=64GiB", "0=3GiB", 32),
        ("auto", "cuda:0=60GiB,cpu=256GiB", None, 65536),
        ("auto", "cuda:0=3GiB,cpu=3GiB", None, 32),
        ("cpu", "cuda:0=60GiB,cpu=3GiB", None, 32),
    ],
)
def test_the_first_remedy_really_works(spec: str, devices: str, max_memory: str | None, samples: int) -> None:
    work = Work(QuantizeConfig(), CalibrationConfig(samples=samples, seq_len=512))
    made = case(spec, MODEL, devices, max_memory=max_memory, work=work)
    tried = []

    def fits(changed: object) -> bool:
        tried.append(changed)
        again = changed
        assert isinstance(again, type(made))
        found = resolve(
            again.spec, again.facts, again.budgets, max_memory=again.max_memory, work=again.work, given=True
        )
        return found.report.ok

    assert not fits(made)
    remedies = cheapest(made, fits)
    assert 1 <= len(remedies) <= 3
    assert len({str(remedy) for remedy in remedies}) == len(remedies)
    assert all(remedy.price for remedy in remedies)


def test_memory_held_by_others_is_a_remedy_on_a_real_machine() -> None:
    busy = tuple(replace(b, free_bytes=b.free_bytes // 20) for b in parse_inventory("cuda:0=40GiB,cpu=64GiB"))
    made = resolve(DeviceMap.parse("0"), MODEL, busy, work=SMALL_WORK)
    (finding,) = [f for f in made.report.findings if f.rule == "memory-budget"]
    assert "end other processes (38.0 GiB on cuda:0" in finding.hint


def test_a_remedy_that_asks_for_more_than_another_is_not_named() -> None:
    work = Work(QuantizeConfig(solve_for="dense"), CalibrationConfig(samples=128, seq_len=2048))
    made = resolved("0", MODEL, "cuda:0=4GiB,cpu=8GiB", work=work)
    (finding,) = [f for f in made.report.findings if f.rule == "memory-budget"]
    assert "--solve-for own (less accurate)" in finding.hint
    assert "--solve-for own --" not in finding.hint
