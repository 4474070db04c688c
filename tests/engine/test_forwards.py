"""Parked, replayed and plain forwards are one and the same, bit for bit, on every architecture."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gptq_cli.engine.calls import BlockCall, hidden_of
from gptq_cli.engine.forwards import Forwards, ParkedForwards, ReplayedForwards
from gptq_cli.engine.stages import Stage, find_stages
from gptq_cli.errors import GptqError
from tests.engine.opened import Opened, open_tiny
from tests.tiny import TINY


def plain_outputs(opened: Opened) -> list[list[Tensor]]:
    """What each block returns for each micro-batch when the model runs untouched."""
    outputs: list[list[Tensor]] = [[] for _ in opened.blocks]
    hooks = [
        block.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(hidden_of(out)))
        for block, kept in zip(opened.blocks, outputs, strict=True)
    ]
    with torch.no_grad():
        for start in range(0, len(opened.input_ids), 2):
            opened.model.base_model(input_ids=opened.input_ids[start : start + 2], use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


def both_ways(
    opened: Opened, index: int, captured, hidden: list[Tensor]
) -> tuple[tuple[Stage, ...], dict[str, Forwards]]:
    block, linears = opened.blocks[index], opened.linears(index)
    stages = find_stages(block, linears, captured.probes[index], hidden[0][:1, :16])
    calls = captured.calls[index]
    return stages, {
        "parked": ParkedForwards(block, linears, stages, calls, list(hidden)),
        "replayed": ReplayedForwards(block, linears, stages, calls, list(hidden)),
    }


@pytest.mark.parametrize("name", TINY)
def test_every_way_gives_the_plain_forward(name: str) -> None:
    opened = open_tiny(name)
    captured = opened.capture()
    plain = plain_outputs(opened)
    hidden = captured.hidden
    for index in range(len(opened.blocks)):
        stages, ways = both_ways(opened, index, captured, hidden)
        inputs, outputs = {}, {}
        for way, forwards in ways.items():
            with forwards as run:
                inputs[way] = [x.clone() for stage in stages for _, x in run.inputs([stage])]
                outputs[way] = [hidden_of(output) for output in run.finish()]
        assert len(inputs["parked"]) == len(stages) * 3
        for a, b in zip(inputs["parked"], inputs["replayed"], strict=True):
            assert torch.equal(a, b)
        for way in ways:
            for ours, theirs in zip(outputs[way], plain[index], strict=True):
                assert torch.equal(ours, theirs)
        hidden = outputs["parked"]


def test_replayed_collects_all_stages_in_one_pass() -> None:
    opened = open_tiny("llama")
    captured = opened.capture()
    stages, ways = both_ways(opened, 0, captured, captured.hidden)
    runs: Counter[str] = Counter()
    for name, module in opened.linears(0).items():
        module.register_forward_hook(lambda *_, name=name: runs.update([name]))
    together = [(stage, x.clone()) for stage, x in ways["replayed"].inputs(stages)]
    assert runs["self_attn.q_proj"] == 3
    assert runs["mlp.down_proj"] == 0, "nothing after the last stage's input is needed"
    for stage in stages:
        one_by_one = [x for _, x in ways["replayed"].inputs([stage])]
        for x, y in zip(one_by_one, [x for at, x in together if at == stage], strict=True):
            assert torch.equal(x, y)


def test_parked_runs_each_linear_once_and_sees_edits_downstream() -> None:
    opened = open_tiny("llama")
    captured = opened.capture()
    linears = opened.linears(0)
    runs: Counter[str] = Counter()
    for name, module in linears.items():
        module.register_forward_hook(lambda *_, name=name: runs.update([name]))
    stages, ways = both_ways(opened, 0, captured, captured.hidden)
    runs.clear()
    original = {name: module.weight.detach().clone() for name, module in linears.items()}
    results = {}
    for way in ("parked", "replayed"):
        for name, module in linears.items():
            module.weight.data.copy_(original[name])
        runs.clear()
        with ways[way] as run:
            for stage in stages:
                for _ in run.inputs([stage]):
                    pass
                for name in stage.linears:
                    linears[name].weight.data.mul_(0.5)
            results[way] = run.finish()
        if way == "parked":
            assert set(runs.values()) == {3}, "three micro-batches, each linear once for each"
        else:
            assert runs["self_attn.q_proj"] > 3
    for ours, theirs in zip(results["parked"], results["replayed"], strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(results["parked"][0], plain_outputs(open_tiny("llama"))[0][0])


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_an_abandoned_run_leaves_no_thread_and_no_hook(stop_after: int) -> None:
    opened = open_tiny("llama")
    captured = opened.capture()
    stages, ways = both_ways(opened, 0, captured, captured.hidden)
    with pytest.raises(KeyboardInterrupt), ways["parked"] as run:
        for stage in stages[:stop_after]:
            for _ in run.inputs([stage]):
                pass
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name == "gptq-forward"]
    assert not any(module._forward_pre_hooks for module in opened.blocks[0].modules())


def test_an_error_inside_a_forward_reaches_the_engine() -> None:
    opened = open_tiny("llama")
    captured = opened.capture()
    stages, ways = both_ways(opened, 0, captured, captured.hidden)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("inside")

    opened.blocks[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError, match="inside"), ways["parked"] as run:
        for stage in stages:
            for _ in run.inputs([stage]):
                pass


def test_a_stage_out_of_order_is_an_error() -> None:
    opened = open_tiny("llama")
    captured = opened.capture()
    stages, ways = both_ways(opened, 0, captured, captured.hidden)
    with pytest.raises(GptqError, match="was expected"), ways["parked"] as run:
        next(iter(run.inputs([stages[1]])))


def test_replayed_forwards_prove_that_a_stage_shares_its_input() -> None:
    opened = open_tiny("llama")
    captured = opened.capture()
    block, linears = opened.blocks[0], opened.linears(0)
    for names, holds in (
        (("self_attn.q_proj", "self_attn.k_proj"), True),
        (("self_attn.q_proj", "mlp.up_proj"), False),
    ):
        run = ReplayedForwards(block, linears, (Stage(names),), captured.calls[0], list(captured.hidden))
        if holds:
            assert len(run.finish()) == len(captured.hidden)
            continue
        with pytest.raises(GptqError, match="shared their input for the traced sample"):
            run.finish()


class Reusing(nn.Module):
    """Two linears that read one tensor, or where `parts` is set another one at the very same address."""

    def __init__(self, seen: Callable[[Tensor | None], None]) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.memory = bytearray(4 * 3 * 4)
        self.parts = self.skips = False
        self.seen = seen

    def _at_the_address(self, x: Tensor) -> Tensor:
        at = torch.frombuffer(self.memory, dtype=torch.float32).view(x.shape)
        at.copy_(x)
        return at

    def forward(self, hidden: Tensor) -> Tensor:
        x = self._at_the_address(hidden)
        first = self.first(x)
        if self.parts:
            address = x.data_ptr()
            del x
            x = self._at_the_address(hidden + 1)
            assert x.data_ptr() == address
        self.seen(x)
        second = first if self.skips else self.second(x)
        del x
        self.seen(None)
        return self.last(first + second)


STAGES = (Stage(("first", "second")), Stage(("last",)))


def run_reusing(way: type[ParkedForwards | ReplayedForwards], block: Reusing) -> list[Tensor]:
    calls, hidden = [BlockCall((), {})] * 2, [torch.ones(1, 3, 4), torch.zeros(1, 3, 4)]
    with way(block, dict(block.named_children()), STAGES, calls, hidden) as run:
        for stage in STAGES if way is ParkedForwards else ():
            for _ in run.inputs([stage]):
                pass
        return run.finish()


@pytest.mark.parametrize("way", [ParkedForwards, ReplayedForwards])
def test_another_tensor_at_the_same_address_is_no_shared_input(
    way: type[ParkedForwards | ReplayedForwards],
) -> None:
    block = Reusing(lambda x: None)
    assert len(run_reusing(way, block)) == 2
    block.parts = True
    with pytest.raises(GptqError, match="'second' and 'first' shared their input for the traced sample"):
        run_reusing(way, block)


@pytest.mark.parametrize("way", [ParkedForwards, ReplayedForwards])
def test_a_linear_that_a_later_sample_leaves_out_is_told(
    way: type[ParkedForwards | ReplayedForwards],
) -> None:
    block = Reusing(lambda x: None)
    block.skips = True
    with pytest.raises(GptqError, match="'second' and 'first' shared their input for the traced sample"):
        run_reusing(way, block)


@pytest.mark.parametrize("way", [ParkedForwards, ReplayedForwards])
def test_the_shared_input_is_held_until_the_last_linear_of_its_stage_and_no_longer(
    way: type[ParkedForwards | ReplayedForwards],
) -> None:
    held: list[weakref.ref[Tensor]] = []

    def seen(x: Tensor | None) -> None:
        if x is not None:
            held.append(weakref.ref(x))
            return
        gc.collect()
        assert held[-1]() is None

    run_reusing(way, Reusing(seen))
    assert len(held) == 2
    block = Reusing(lambda x: alive.append(read[-1]() is not None))
    block.parts = True
    alive: list[bool] = []
    read: list[weakref.ref[Tensor]] = []
    block.first.register_forward_pre_hook(lambda _, args: read.append(weakref.ref(args[0])))
    with pytest.raises(GptqError):
        run_reusing(way, block)
    assert alive == [True], "held though the block let go of it"
