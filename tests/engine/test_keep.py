"""Going on after finished blocks: what enters the next block is the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig
from gptq_cli.engine import run as run_module
from gptq_cli.engine.capture import Captured
from gptq_cli.engine.driven import Driven
from gptq_cli.engine.keep import NothingKept, by_sample, restore
from gptq_cli.engine.loop import LoopOptions
from gptq_cli.engine.opening import EngineRun
from gptq_cli.engine.run import quantize_model
from gptq_cli.events import BlockFinished, Event, Observer, ignore
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.model.describe import model_facts
from gptq_cli.model.find import find_model
from gptq_cli.model.skeleton import LinearInfo, open_skeleton
from gptq_cli.placement.device import CPU
from gptq_cli.placement.device_map import DeviceMap
from gptq_cli.placement.placement import DeviceBudget
from gptq_cli.planning.cases import Work
from gptq_cli.preflight.resolve import resolve
from gptq_cli.ranks.leaves import Share
from tests.architectures import build
from tests.conftest import TinyFactory


class Kept(NothingKept):
    """A keeper in memory, which has what `earlier` kept up to block `done`."""

    def __init__(self, earlier: Kept | None = None, done: int = 0, snapshot: int = 0) -> None:
        self.stored: dict[str, PackedTensors] = dict(earlier.stored) if earlier else {}
        self.finished = earlier.finished[:done] if earlier else ()
        self.states = list(earlier.states[:done]) if earlier else []
        self.snapshot = snapshot

    def store(self, linear: LinearInfo, packed: PackedTensors) -> None:
        self.stored[linear.name] = packed

    def packed(self, linear: LinearInfo) -> PackedTensors:
        return self.stored[linear.name]

    def restore(self, captured: Captured) -> int:
        if not self.snapshot:
            return 0
        held = {name: (lambda value=value: value) for name, value in self.states[self.snapshot - 1].items()}
        assert restore(captured, held, self.snapshot)
        return self.snapshot

    def keep(self, report: Any, captured: Captured) -> None:
        named = by_sample(captured)
        assert named is not None
        self.states.append({name: row.clone() for name, row in named})
        self.finished = (*self.finished, report)


def quantized(model: Path, keeper: Kept, observer: Observer = ignore, **config: Any) -> None:
    ref = ModelRef(model=str(model))
    skeleton = open_skeleton(find_model(ref), ref)
    facts = model_facts(skeleton)
    work = Work(
        QuantizeConfig(group_size=32, **config), CalibrationConfig(samples=5, seq_len=24, batch_size=2)
    )
    budgets = (DeviceBudget(CPU, 1 << 36, 1 << 36),)
    resolved = resolve(DeviceMap.parse("cpu"), facts, budgets, work=work)
    assert resolved.placement is not None
    assert resolved.schedule is not None
    ids = torch.randint(0, 512, (5, 24), generator=torch.Generator().manual_seed(1))
    run = EngineRun(
        skeleton=skeleton,
        placement=resolved.placement,
        schedule=resolved.schedule,
        config=work.quantize,
        options=LoopOptions(strict=False, devices=(CPU,)),
    )
    quantize_model(run, ids, keeper.store, observer, keeper)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("solve_for", ["own", "dense"])
@pytest.mark.parametrize("snapshot", [0, 1])
def test_the_states_are_the_same_to_the_last_bit(
    dtype: torch.dtype, solve_for: str, snapshot: int, tiny: TinyFactory
) -> None:
    model = tiny("llama", dtype=dtype)
    whole = Kept()
    quantized(model, whole, solve_for=solve_for)
    gone_on = Kept(whole, 2, snapshot)
    quantized(model, gone_on, solve_for=solve_for)
    assert len(gone_on.finished) == 3
    assert same(gone_on.states[2], whole.states[2])


@pytest.mark.parametrize("config", [{"bits": 3}, {"bits": 8, "sym": False}, {"desc_act": True}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe"])
def test_every_form_of_codes(name: str, config: dict[str, Any], tiny: TinyFactory) -> None:
    whole = Kept()
    quantized(tiny(name), whole, **config)
    gone_on = Kept(whole, 1)
    quantized(tiny(name), gone_on, **config)
    assert same(gone_on.states[1], whole.states[1])


def test_a_block_is_kept_before_it_is_announced(tiny: TinyFactory) -> None:
    keeper, announced = Kept(), []

    def observe(event: Event) -> None:
        if isinstance(event, BlockFinished):
            announced.append((event.report.name, tuple(report.name for report in keeper.finished)))

    quantized(tiny("gpt2"), keeper, observe)
    first, second = "transformer.h.0", "transformer.h.1"
    assert announced == [(first, (first,)), (second, (first, second))]


class KeptOpen(Kept):
    """For forwards that are kept open: their hidden states do not come by sample."""

    def keep(self, report: Any, captured: Any) -> None:
        assert isinstance(captured, Driven)
        assert by_sample(captured) is None
        self.finished = (*self.finished, report)


@pytest.mark.parametrize("done", [1, 3])
def test_forwards_that_are_kept_open(done: int, tmp_path: Path) -> None:
    """They run through the finished blocks again: in the dense copy, then with the codes' weights."""
    build("gemma3n_text").save_pretrained(tmp_path)
    whole = KeptOpen()
    quantized(tmp_path, whole, solve_for="dense")
    gone_on = KeptOpen(whole, done)
    wanted = dict(whole.stored)
    for name in wanted:
        if int(name.split(".")[2]) >= done:
            del gone_on.stored[name]
    quantized(tmp_path, gone_on, solve_for="dense")
    assert gone_on.stored.keys() == wanted.keys()
    for name, packed in wanted.items():
        assert torch.equal(packed.qweight, gone_on.stored[name].qweight), name
        assert torch.equal(packed.scales, gone_on.stored[name].scales), name


def test_a_finished_model_is_not_even_opened(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Kept()
    quantized(tiny_llama, whole)
    opened: list[object] = []
    monkeypatch.setattr(run_module, "open_stream", lambda *words: opened.append(words))
    quantized(tiny_llama, Kept(whole, 3))
    assert opened == []


def captured(batches: list[tuple[int, ...]], paired: int) -> Captured:
    """Hidden states whose values say which sample they are of."""
    hidden = [torch.tensor(batch).float().reshape(-1, 1, 1).expand(-1, 3, 2).clone() for batch in batches]
    dense = [-tensor for tensor in hidden[:paired]]
    return Captured(hidden=hidden, calls=[], probes=[], share=Share(batches, paired), dense=dense)


def stored(of: Captured) -> dict[str, Callable[[], Tensor]]:
    named = by_sample(of)
    assert named is not None
    return {name: (lambda value=value: value) for name, value in named}


def test_a_snapshot_fits_another_batch_size() -> None:
    before = captured([(1, 3), (0, 2), (4,)], paired=1)
    now = captured([(1,), (3,), (0, 2, 4)], paired=2)
    blank = [tensor.zero_() for tensor in (*now.hidden, *now.dense)]
    assert len(blank) == 5
    assert restore(now, stored(before), 0)
    assert [tensor[:, 0, 0].tolist() for tensor in now.hidden] == [[1], [3], [0, 2, 4]]
    assert [tensor[:, 0, 0].tolist() for tensor in now.dense] == [[-1], [-3]]


def test_a_snapshot_of_other_samples_changes_nothing() -> None:
    now = captured([(0, 1), (2, 3)], paired=1)
    assert not restore(now, stored(captured([(0, 1), (2, 4)], paired=1)), 0)
    assert now.hidden[1][:, 0, 0].tolist() == [2, 3]


def test_states_that_do_not_come_by_sample_are_not_kept() -> None:
    flat = captured([(0, 1)], paired=0)
    flat.hidden[0] = flat.hidden[0].reshape(6, 2)
    assert by_sample(flat) is None
