"""Tuning scales, norms and biases of a model whose blocks are packed, on the logits of the dense model.

The maths is `gptq.tuning`. Here is how the gradient goes through a model of which one block is in memory at a
time. For each step, some samples:

    embed, then block after block        decode its weights, run it, keep what enters it
    norm, head                           logits and those of the dense model, some tokens at a time
    back through the blocks              decode again, run again with gradients, move what is tuned in it

The dense model's logits are made of the dense stream behind the last block, which is there anyway: the blocks
were solved for the dense model's outputs. What lies behind the blocks is the model's own code (`model_tail`).

An eighth of the samples takes no part. When all steps are done, these decide how much of the way is gone: all
of it, half, or nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gptq_cli.config import QuantizeConfig
from gptq_cli.devices.accelerators import torch_device
from gptq_cli.engine.capture import Captured, capture
from gptq_cli.engine.keep import Keeper
from gptq_cli.engine.model_tail import ModelTail
from gptq_cli.engine.tuned import Tuned
from gptq_cli.engine.tuned_block import TunedBlock, TunedLinear
from gptq_cli.events import Observer, counted, phase
from gptq_cli.gptq.tuning import Moving, best_part, rate_at
from gptq_cli.model.dense_part import open_dense_part
from gptq_cli.model.skeleton import LinearInfo, Skeleton
from gptq_cli.model.text_part import language_model
from gptq_cli.placement.names import parents
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import TUNE_HELD_OUT, TUNE_STEP_TOKENS, BlockSchedule, Schedule
from gptq_cli.results.run import TuningReport

_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationText:
    """The samples, and what the dense model makes of them."""

    input_ids: Tensor
    """(samples, seq_len) int64."""
    goals: Mapping[int, Tensor]
    """Sample -> what the dense model's last block handed on for it, (seq_len, hidden_size)."""

    @property
    def seq_len(self) -> int:
        """Tokens of a sample."""
        return self.input_ids.shape[1]

    def of(self, samples: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Ids (1, seq_len) and goal (1, seq_len, hidden_size) of each of some samples."""
        return [(self.input_ids[sample][None], self.goals[sample][None]) for sample in samples]


def text_of(states: Captured, input_ids: Tensor) -> CalibrationText:
    """The samples whose dense stream has come to the end of the last block; `states` are consumed."""
    goals = {
        sample: row
        for hidden, batch in zip(states.dense, states.samples, strict=False)
        for sample, row in zip(batch, hidden, strict=True)
    }
    states.hidden.clear()
    states.dense.clear()
    return CalibrationText(input_ids, goals)


def tune_model(model: TunedModel, text: CalibrationText, epochs: int, observer: Observer) -> Tuned:
    """Tune for so many passes over the text, less what is held out. Nothing is written."""
    started = time.perf_counter()
    training, held = split(sorted(text.goals))
    steps = list(_steps(training, epochs, max(1, TUNE_STEP_TOKENS // text.seq_len)))
    with phase(observer, "tune", len(steps)) as words:
        before = model.loss(held, text, 0.0)
        advanced = counted(observer, "tune")
        for number, samples in enumerate(steps):
            model.step(samples, text, rate_at(number, len(steps)))
            advanced(number + 1, len(steps))
        part, after = best_part(lambda part: model.loss(held, text, part), before)
        report = TuningReport(
            kl_before=before,
            kl_after=after,
            part=part,
            epochs=epochs,
            steps=len(steps),
            samples=len(training),
            held_out_samples=len(held),
            scales=model.scales,
            vector_numbers=model.vector_numbers,
            seconds=time.perf_counter() - started,
        )
        words.append(report.words)
    return Tuned(report, model.tensors(part) if part else {})


def split(samples: Sequence[int]) -> tuple[list[int], list[int]]:
    """Those to train on, and those held out: evenly spread, at least one of either where there are two."""
    held = samples[TUNE_HELD_OUT // 2 :: TUNE_HELD_OUT] or samples[-1:]
    return [sample for sample in samples if sample not in set(held)], list(held)


def _steps(samples: Sequence[int], epochs: int, per_step: int) -> Iterator[list[int]]:
    """The samples of each step: all of them once in every epoch, in another order each time."""
    generator = torch.Generator().manual_seed(_SEED)
    for _ in range(epochs):
        order = [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
        yield from (order[i : i + per_step] for i in range(0, len(order), per_step))


class TunedModel:
    """The model as it is tuned: all that stays dense in memory, blocks decoded one at a time."""

    def __init__(
        self,
        skeleton: Skeleton,
        placement: Placement,
        schedule: Schedule,
        config: QuantizeConfig,
        keeper: Keeper,
    ) -> None:
        self._skeleton, self._config, self._keeper = skeleton, config, keeper
        self._batch_size = schedule.micro_batch_samples
        main = torch_device(placement.main_device)
        devices = {block.name: torch_device(block.execution_device) for block in schedule.blocks}
        model = open_dense_part(
            skeleton, lambda name: next((devices[n] for n in parents(name) if n in devices), main)
        )
        text = language_model(model)
        own = {id(p): name for name, p in text.named_parameters()}
        self._sources = dict(self._stored_vectors(model))
        self.blocks = [self._block(model, block) for block in schedule.blocks]
        inside = frozenset(skeleton.blocks)
        outside = {
            name: own[id(model.get_parameter(name))]
            for name in self._sources
            if inside.isdisjoint(parents(name)) and id(model.get_parameter(name)) in own
        }
        self._outside = {name: self._vector(model, name) for name in outside}
        self.tail = ModelTail(
            model=text,
            blocks=[block.module for block in self.blocks],
            flow=skeleton.trace.flow,
            device=main,
            vectors={outside[name]: vector for name, vector in self._outside.items()},
        )

    def _stored_vectors(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        """Gains and biases, by their names in the model and in the files: those that are one tensor in
        both. Biases of experts, which are parts of a tensor (E, N), stay as they are."""
        files = {tensor.name: tensor for tensor in self._skeleton.files.tensors}
        tied = {name for group in self._skeleton.tied for name in group}
        for name, parameter in model.named_parameters():
            source = self._skeleton.keys.source_of(name)
            if parameter.ndim != 1 or parameter.is_meta or source is None or name in tied:
                continue
            plain = files[source].coded is None and files[source].shape == tuple(parameter.shape)
            if plain and bool(parameter.any()):
                yield name, source

    def _block(self, model: nn.Module, schedule: BlockSchedule) -> TunedBlock:
        prefix = f"{schedule.name}."
        return TunedBlock(
            schedule=schedule,
            module=model.get_submodule(schedule.name),
            dtype=self._skeleton.dtype,
            packed=self._keeper.packed,
            linears={
                info.name.removeprefix(prefix): TunedLinear(
                    info,
                    self._config.of_linear(info.name),
                    self._config.checkpoint_format,
                    self._scales(info, torch_device(schedule.execution_device)),
                )
                for info in self._skeleton.linears_of(schedule.name)
            },
            vectors={
                name.removeprefix(prefix): self._vector(model, name)
                for name in self._sources
                if name.startswith(prefix)
            },
        )

    def _scales(self, info: LinearInfo, device: torch.device) -> Moving:
        bits = self._config.of_linear(info.name).bits
        return Moving.scales(self._keeper.packed(info).scales.to(device), bits)

    def _vector(self, model: nn.Module, name: str) -> Moving:
        return Moving.vector(model.get_parameter(name).detach(), self._config.bits)

    def loss(self, samples: Sequence[int], text: CalibrationText, part: float) -> float:
        """KL(dense ‖ quantized), mean over the tokens of `samples`, `part` of the way of what moves."""
        captured = self._entering(samples, text)
        hidden = captured.hidden
        for index, block in enumerate(self.blocks):
            with block.decoded(part) as decoded:
                hidden = decoded.run_all(captured.calls[index], hidden)
        behind = zip(captured.samples, hidden, strict=True)
        total = sum(self.tail.loss(text.of(batch), out, part) for batch, out in behind)
        return total / (len(samples) * text.seq_len)

    def step(self, samples: Sequence[int], text: CalibrationText, rate: float) -> None:
        """One step of everything that moves, by the gradient of the loss on `samples`."""
        captured = self._entering(samples, text)
        entering = [captured.hidden]
        for index, block in enumerate(self.blocks):
            with block.decoded() as decoded:
                entering.append(decoded.run_all(captured.calls[index], entering[-1]))
        tokens = len(samples) * text.seq_len
        pairs = zip(captured.samples, entering.pop(), strict=True)
        gradients = self.tail.step([(text.of(batch), out) for batch, out in pairs], tokens, rate)
        for index, block in reversed(list(enumerate(self.blocks))):
            with block.decoded(gradients=True) as decoded:
                inputs = zip(captured.calls[index], entering.pop(), strict=True)
                for place, (call, hidden) in enumerate(inputs):
                    gradients[place] = decoded.backward(call, hidden, gradients[place])
                decoded.step(tokens, rate)

    def _entering(self, samples: Sequence[int], text: CalibrationText) -> Captured:
        """What enters the first block for `samples`, and how every block is called; the samples of its
        micro-batches are those of the text."""
        captured = capture(
            self.tail.model.base_model,
            self.tail.blocks,
            text.input_ids[list(samples)],
            self.tail.flow,
            batch_size=self._batch_size,
            input_device=self.tail.device,
            rest_device=self.blocks[0].rest,
        )
        batches = [tuple(samples[place] for place in batch) for batch in captured.samples]
        return replace(captured, share=replace(captured.share, batches=batches))

    def tensors(self, part: float) -> dict[str, Tensor]:
        """The tensors of the checkpoint that moved, by their names there."""
        found = {}
        moved = dict(self._outside)
        for block in self.blocks:
            for linear in block.linears.values():
                found[f"{linear.info.source_name}.scales"] = linear.scales.value(part).cpu()
            moved |= {f"{block.schedule.name}.{name}": vector for name, vector in block.vectors.items()}
        return found | {self._sources[name]: vector.value(part).cpu() for name, vector in moved.items()}

    @property
    def scales(self) -> int:
        """How many scales there are to tune."""
        return sum(x.scales.start.numel() for block in self.blocks for x in block.linears.values())

    @property
    def vector_numbers(self) -> int:
        """How many numbers of gains and biases."""
        inside = (vector for block in self.blocks for vector in block.vectors.values())
        return sum(vector.start.numel() for vector in (*inside, *self._outside.values()))
