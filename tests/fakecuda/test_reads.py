"""The host does not wait for the device inside a stage: what it reads there does not grow with the text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptq_cli import jobs
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.errors import NonFinite
from gptq_cli.events import BlockFinished, BlockStarted, Event
from gptq_cli.jobs.keeping import Keeping
from gptq_cli.jobs.snapshot_time import Clock
from gptq_cli.placement.device_map import DeviceMap

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("devices")]
Tiny = Callable[..., Path]
NUMBERS = 64
"""A tensor of so many values is a few numbers that the host wants to know."""


class Reads(TorchDispatchMode):
    """Counts what the engine's thread brings from a device to the host: numbers, and tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.numbers = self.tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.inside:
            self._note(str(func), [x for x in args if isinstance(x, torch.Tensor)], result)
        return result

    def _note(self, name: str, given: list[torch.Tensor], result: Any) -> None:
        if name.startswith(("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.equal")):
            self.numbers += any(x.is_cuda for x in given)
        elif name.startswith(("aten.copy_", "aten._to_copy", "aten._copy_from")) and not result.is_cuda:
            small = result.numel() <= NUMBERS
            self.numbers += small and any(x.is_cuda for x in given)
            self.tensors += not small and any(x.is_cuda for x in given)

    def outside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, within which nothing is counted."""

        def uncounted(*args: Any, **kwargs: Any) -> Any:
            before, self.inside = self.inside, False
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = before

        return uncounted

    def observe(self, event: Event) -> None:
        """Counts inside blocks only."""
        match event:
            case BlockStarted():
                self.inside = True
            case BlockFinished():
                self.inside = False
            case _:
                pass


@pytest.fixture
def reads(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`reads(model, samples, …)`: numbers read inside the blocks of a run with micro-batches of one sample.
    What is written, which has to be read, is not counted; the hidden states are written behind each block,
    which in other runs depends on the time."""

    def made(model: Path, samples: int, **options: Any) -> int:
        counted = Reads()
        job = QuantizeJob(
            model=ModelRef(model=str(model)),
            out=str(tmp_path / f"out{samples}"),
            quantize=QuantizeConfig(group_size=32, **options),
            calibration=CalibrationConfig.of(str(text), samples=samples, seq_len=32, batch_size=1),
            device_map=DeviceMap.parse("cuda:0"),
        )
        with monkeypatch.context() as patch, counted:
            for writes in ((CheckpointWriter, "add_packed"), (Keeping, "keep")):
                patch.setattr(*writes, counted.outside(getattr(*writes)))
            patch.setattr(Clock, "snapshot_due", lambda *_: True)
            jobs.quantize(job, counted.observe)
        assert counted.tensors == 0
        return counted.numbers

    return made


@pytest.mark.parametrize("options", [{}, {"sym": False, "desc_act": True}], ids=str)
def test_a_stage_reads_four_times_whatever_the_text(
    reads: Callable[..., int], tiny: Tiny, options: dict[str, Any]
) -> None:
    """Three blocks of four stages: is all that was collected finite, are H and the weights, did the
    factorisation work, the losses."""
    for samples in (2, 7):
        assert reads(tiny("llama"), samples, solve_for="own", **options) == 3 * 4 * 4


def test_stages_that_are_collected_together_are_asked_together(reads: Callable[..., int], tiny: Tiny) -> None:
    for samples in (2, 7):
        found = reads(tiny("llama"), samples, solve_for="own", true_sequential=False)
        assert found == 3 * (1 + 4 * 3)


def test_the_dense_stream_costs_two_reads_for_each_step_that_is_tried(
    reads: Callable[..., int], tiny: Tiny
) -> None:
    """At most four, and a last one; with fewer than four pairs none."""
    assert reads(tiny("llama"), 2, solve_for="dense") == 3 * 4 * 4
    assert reads(tiny("llama"), 8, solve_for="dense") <= 3 * 4 * (4 + 2 * 4 + 1)


def test_the_count_sees_a_read_of_every_kind() -> None:
    """The checks above can fail."""
    x = torch.arange(100, device="cuda")
    with Reads() as counted:
        counted.inside = True
        for read in (
            lambda: x[0].item(),
            lambda: bool(x[1] > 0),
            lambda: x[:5].tolist(),
            lambda: float(x[2]),
        ):
            before = counted.numbers
            read()
            assert counted.numbers > before
        x.cpu()
    assert counted.tensors == 1


@pytest.mark.parametrize("sequential", [True, False])
def test_the_sample_is_named_by_looking_again(
    tiny: Tiny, text: Path, tmp_path: Path, sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of two; what enters block 1 for sample 3 holds one infinity."""
    from gptq_cli.engine import loop

    real = loop.quantize_block

    def spoiled(context: Any, inputs: Any, states: Any) -> Any:
        if context.block.name.endswith(".1"):
            inputs.hidden[1][1, 0, 0] = torch.inf
        return real(context, inputs, states)

    monkeypatch.setattr(loop, "quantize_block", spoiled)
    job = QuantizeJob(
        model=ModelRef(model=str(tiny("llama"))),
        out=str(tmp_path / "out"),
        quantize=QuantizeConfig(group_size=32, true_sequential=sequential),
        calibration=CalibrationConfig.of(str(text), samples=6, seq_len=32, batch_size=2),
        device_map=DeviceMap.parse("cuda:0"),
    )
    with pytest.raises(NonFinite, match=r"'self_attn.q_proj' in block 'model.layers.1' .* for sample 3 of"):
        jobs.quantize(job)
