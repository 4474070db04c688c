"""One pass over the dense model before the work, forward and back: what `gradients` is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.config import QuantizeConfig
from gptq_cli.devices.accelerators import flush, torch_device, working_on
from gptq_cli.devices.host_buffers import to_device
from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.engine.capture import Captured, capture, spread
from gptq_cli.engine.going_back import GoingBack
from gptq_cli.engine.gradients import Gradients, KeptStates, run_through
from gptq_cli.engine.model_tail import ModelTail
from gptq_cli.engine.opening import EngineRun, input_device_of, open_stream, opened_blocks
from gptq_cli.engine.work import Block
from gptq_cli.events import CacheFlushed, Observer, Warned, counted, phase
from gptq_cli.model.block_stream import BlockStream
from gptq_cli.model.dense_part import open_dense_part
from gptq_cli.model.text_part import language_model
from gptq_cli.placement.device import CPU
from gptq_cli.placement.names import parents
from gptq_cli.wording import first_line

_SEED = 0


def gradient_samples(config: QuantizeConfig, ids: Tensor) -> list[int]:
    """The samples that are gone back through: evenly spread over the paired ones."""
    count, length = ids.shape
    pairs = spread(count, config.paired_samples(count, length))
    return [pairs[place] for place in spread(len(pairs), config.fisher_samples(count, length))]


def called(run: EngineRun, stream: BlockStream, blocks: Sequence[Block], ids: Tensor) -> Captured:
    """How every block is called for the samples of `ids`, and what enters the first."""
    text = language_model(stream.model)
    with stream.for_capture():
        return capture(
            text.base_model,
            [block.module for block in blocks],
            ids,
            run.skeleton.trace.flow,
            batch_size=run.schedule.micro_batch_samples,
            input_device=input_device_of(text, run.placement.main_device),
            rest_device=torch_device(CPU) if run.schedule.blocks[0].activations_on_host else None,
        )


def take_gradients(run: EngineRun, ids: Tensor, observer: Observer) -> bool:
    """Take those of the samples of `ids`, unless an earlier run did, and keep them in `run.states`.

    The flow of the model is direct, and its blocks share no weights. False, after a warning, for a model that
    cannot be gone back through.
    """
    if run.states.complete:
        return True
    try:
        with phase(observer, "gradients", 2 * len(run.schedule.blocks)):
            _Pass(run, ids, observer).run()
    except _NoGradient as error:
        observer(
            Warned(
                f"no gradients: {error}; rows are solved apart, as with --fisher-tokens 0",
                error.hint,
            )
        )
        return False
    run.states.finish()
    return True


def gradients_of(
    run: EngineRun, stream: BlockStream, blocks: Sequence[Block], ids: Tensor, samples: Sequence[int]
) -> Gradients:
    """What was kept of them, for the blocks of an open stream."""
    states = called(run, stream, blocks, ids[list(samples)])
    return Gradients(
        kept=run.states,
        batches=[tuple(samples[place] for place in batch) for batch in states.samples],
        calls=states.calls,
        numbers={block.name: number for number, block in enumerate(blocks)},
    )


class _NoGradient(Exception):  # noqa: N818 - what is missing, not a fault
    """The model cannot be gone back through; says why."""

    def __init__(self, why: str, hint: str = "report it with the model's config.json") -> None:
        super().__init__(why)
        self.hint = hint


class _Pass:
    def __init__(self, run: EngineRun, ids: Tensor, observer: Observer) -> None:
        self._run, self._ids, self._observer = run, ids, observer
        self._kept: KeptStates = run.states
        self._samples = gradient_samples(run.config, ids)

    def run(self) -> None:
        run, observer = self._run, self._observer
        total = 2 * len(run.schedule.blocks)
        advanced = counted(observer, "gradients")
        with open_stream(run, observer) as stream, torch.no_grad():
            blocks = opened_blocks(stream.model, run, stream)
            states = called(run, stream, blocks, self._ids[self._samples])
            stream.release()
            for number, block in enumerate(blocks):
                self._on(block, partial(self._forward, states, number))
                advanced(number + 1, total)
        del stream, blocks
        gradients = self._behind(states)
        order = [block.name for block in reversed(run.schedule.blocks)]
        with open_stream(run, observer, order) as stream:
            stream.release()
            blocks = opened_blocks(stream.model, run, stream)
            for number, block in reversed(list(enumerate(blocks))):
                self._on(block, partial(self._back, states, gradients, number))
                advanced(total - number, total)

    def _on(self, block: Block, work: Callable[[Block], None]) -> None:
        with working_on(block.device), block.on_device():
            work(block)
        before, after = flush(self._run.options.devices)
        self._observer(CacheFlushed(where="block", subject=block.name, before=before, after=after))

    def _forward(self, states: Captured, number: int, block: Block) -> None:
        """Keep what enters the block, and go on with what it hands on."""
        length = self._ids.shape[1]
        pairs = self._micro_batches(states, states.hidden)
        if any(hidden.shape[:2] != (len(batch), length) for hidden, batch in pairs):
            raise _NoGradient(f"the hidden states of {block.name} do not come sample by sample")
        self._keep(number, states, states.hidden)
        rest = torch_device(block.schedule.activation_device)
        for place, call in enumerate(states.calls[number]):
            hidden = to_device(states.hidden[place], block.device)
            states.hidden[place] = to_device(run_through(block.module, call, hidden), rest)

    def _behind(self, states: Captured) -> list[Tensor]:
        """The gradients at what the last block hands on, in the place of it."""
        run = self._run
        main = torch_device(run.placement.main_device)
        model = open_dense_part(run.skeleton, lambda name: main, behind=True)
        _refuse_empty(model, run.skeleton.blocks)
        tail = ModelTail(
            model=language_model(model),
            blocks=[model.get_submodule(block.name) for block in run.schedule.blocks],
            flow=run.skeleton.trace.flow,
            device=main,
            vectors={},
        )
        found = []
        for place, batch in enumerate(states.samples):
            rows = zip(batch, states.hidden[place], strict=True)
            found.append(torch.stack([self._label_gradient(tail, self._samples[i], row) for i, row in rows]))
            states.hidden[place] = found[-1].new_empty(0)
        return found

    def _label_gradient(self, tail: ModelTail, sample: int, out: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(_SEED + sample)
        return _taken(partial(tail.label_gradient, self._ids[sample][None], out, generator), "the head")

    def _back(self, states: Captured, gradients: list[Tensor], number: int, block: Block) -> None:
        """Keep the gradients at what the block hands on, and go on with those at what enters it."""
        entering = {sample: get() for sample, get in self._kept.read(number).items()}
        self._keep(number, states, gradients)  # in the place of what was read
        rest = torch_device(block.schedule.activation_device)
        back = GoingBack(block.module, block.device)
        for place, (batch, call) in enumerate(zip(states.samples, states.calls[number], strict=True)):
            hidden = torch.stack([entering[self._samples[i]] for i in batch])
            run = partial(run_through, block.module, call)
            found = _taken(partial(back, run, hidden, gradients[place]), block.name)
            gradients[place] = to_device(found, rest)
        states.calls[number].clear()

    def _keep(self, number: int, states: Captured, rows: Sequence[Tensor]) -> None:
        self._kept.write(
            number,
            {
                self._samples[i]: row
                for hidden, batch in self._micro_batches(states, rows)
                for i, row in zip(batch, hidden, strict=True)
            },
        )

    def _micro_batches(self, states: Captured, rows: Sequence[Tensor]) -> zip[tuple[Tensor, tuple[int, ...]]]:
        return zip(rows, states.samples, strict=True)


def _taken(back: Callable[[], Tensor], where: str) -> Tensor:
    """A gradient. Raises `_NoGradient` for an operation that has none, and where it is not finite."""
    try:
        found = back()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise _NoGradient(f"{where} cannot be gone back through ({first_line(error)})") from error
    if not bool(torch.isfinite(found).all()):
        raise _NoGradient(
            f"those behind {where} are not finite", "float16 may overflow: try --dtype bfloat16"
        )
    return found


def _refuse_empty(model: Any, blocks: Sequence[str]) -> None:
    """Let a forward raise `_NoGradient` where it comes to a module outside the blocks that was taken for one
    that text does not reach, and has no weights."""

    def refuse(name: str, module: nn.Module, args: Any) -> None:
        raise _NoGradient(f"{name} lies behind the blocks, and was taken for a part that text does not reach")

    for name, module in model.named_modules():
        empty = any(parameter.is_meta for parameter in module.parameters(recurse=False))
        if empty and frozenset(blocks).isdisjoint((name, *parents(name))):
            module.register_forward_pre_hook(partial(refuse, name))
