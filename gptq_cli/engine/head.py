"""The output head: its Hessian from what enters it behind the quantized blocks, its rows solved in pieces.

When the last block is done, the samples have come to the model's final norm. What lies between it and the
head (a norm, a projection, a factor) is the model's own code: its forward runs once more with every block
replaced by a stand-in, the last one handing over the finished hidden states, and stops where the head begins.

A head has as many rows as the vocabulary has tokens. GPTQ never mixes rows, so they are solved `HEAD_ROWS`
at a time, each piece with the same Hessian, and memory stays that of a wide linear. It is solved for its own
output. The model's weight is left as it is, because it may be the embedding too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.devices.accelerators import working_on
from gptq_cli.devices.fp32_matmul import matmul_scope
from gptq_cli.devices.host_buffers import to_device
from gptq_cli.engine.capture import Captured, StopForward, replaced_forward
from gptq_cli.engine.finite import FiniteNotes, named_error, non_finite_error
from gptq_cli.engine.leaf_sums import LeafSums
from gptq_cli.engine.linear_report import check_fallback, check_lost, linear_report
from gptq_cli.engine.shared_solve import Dealt
from gptq_cli.engine.stand_ins import behind_blocks
from gptq_cli.engine.wire import Shape, joined
from gptq_cli.engine.work import Block, WorkOptions
from gptq_cli.errors import GptqError, NonFinite
from gptq_cli.events import LinearQuantized, PhaseAdvanced, phase
from gptq_cli.gptq.hessian import Hessian
from gptq_cli.gptq.packing import PackedTensors, pack
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.gptq.solver import quantize_linears
from gptq_cli.model.blocks import weight_matrix
from gptq_cli.model.flow import Flow
from gptq_cli.model.skeleton import LinearInfo
from gptq_cli.placement.schedule import HEAD_ROWS
from gptq_cli.results.run import LinearReport
from gptq_cli.wording import number_of


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadWork:
    """A model whose blocks are done, and its head."""

    model: Any
    """The language model, head included."""
    module: nn.Module
    """The head itself."""
    blocks: Sequence[Block]
    flow: Flow
    info: LinearInfo
    device: torch.device
    """Where the head is worked on."""
    input_device: torch.device
    """Where token ids enter."""
    options: WorkOptions


def quantize_head(
    work: HeadWork,
    captured: Captured,
    input_ids: Tensor,  # (samples, seq_len) int64
) -> LinearReport:
    """Quantize the head and hand its packed tensors to the store; `captured` is consumed.

    Raises what `quantize_block` raises.
    """
    info, options = work.info, work.options
    started = time.perf_counter()
    with phase(options.observer, "head", len(input_ids)), working_on(work.device):
        with Hessian(info.in_features, work.device) as moment:
            sums = LeafSums(options.team, captured.share.leaves, [moment])
            done, notes = 0, FiniteNotes[int]()
            for place, batch in enumerate(captured.samples):
                sums.reach(place)
                moment.add(_input(work, captured, input_ids, place))
                notes.add(place, moment.finite())
                done += len(batch)
                options.observer(PhaseAdvanced("head", done, len(input_ids)))
            bad = notes.first_bad()
            if bad is not None:
                x = _input(work, captured, input_ids, bad)
                raise non_finite_error((x,), captured.samples[bad], "the model's end", info.name)
            captured.hidden.clear()
            sums.finish()
            hessian, tokens = moment.matrix(), moment.tokens
        quantized, packed = _solved(work, weight_matrix(work.module), hessian)
    check_fallback(info, quantized, tokens, options.observer, strict=options.strict)
    check_lost(info, quantized.loss, packed.scales, options.observer, strict=options.strict)
    options.store(info, packed)
    own = options.config.of_linear(info.name)
    report = linear_report(info, own, quantized, tokens=tokens, seconds=time.perf_counter() - started)
    options.observer(LinearQuantized("", report))
    return report


def _input(work: HeadWork, captured: Captured, input_ids: Tensor, place: int) -> Tensor:
    """What enters the head for micro-batch number `place`, on its device (batch, seq_len, K)."""
    hidden, ids = captured.hidden[place], input_ids[list(captured.samples[place])]
    caught: list[Tensor] = []

    def catch(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        caught.append(x)
        raise StopForward

    with ExitStack() as stack:
        given = to_device(hidden, work.blocks[-1].device)
        stack.enter_context(behind_blocks([block.module for block in work.blocks], work.flow, given))
        stack.enter_context(replaced_forward(work.module, catch))
        stack.enter_context(working_on(work.input_device))
        stack.enter_context(matmul_scope(hidden.dtype, work.blocks[-1].device))
        try:
            with torch.no_grad():
                work.model(input_ids=ids.to(work.input_device), use_cache=False)
        except StopForward:
            pass
    if not caught or caught[0].shape[:-1].numel() != ids.numel():
        found = f"an input of shape {list(caught[0].shape)}" if caught else "no input"
        raise GptqError(
            f"the head {work.info.name} got {found} for {number_of(ids.numel(), 'token')}",
            hint="leave --quantize-head out, and report it with the model's config.json",
        )
    return caught[0].to(work.device)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A piece of the head's rows, solved."""

    linears: list[QuantizedLinear]


def _solved(
    work: HeadWork,
    weight: Tensor,  # (N, K)
    hessian: Tensor,  # (K, K)
) -> tuple[QuantizedLinear, PackedTensors]:
    """Every piece of rows solved and packed; the first tensor that is returned has the losses of all."""
    config = work.options.config.of_linear(work.info.name)
    columns = work.info.in_features

    def shapes(rows: Tensor) -> list[Shape]:
        return [Shape(rows.shape[0], columns, config.groups(columns))]

    def solve(parts: list[Tensor]) -> Iterator[_Rows]:
        for rows in parts:
            try:
                found = quantize_linears([rows.to(work.device)], hessian, config)
            except NonFinite as error:
                raise named_error(error, [work.info.name], [rows], head=True) from error
            yield _Rows(found)

    rows = Dealt(shapes, solve, lambda part, linears, seconds: _Rows(linears))
    pieces: list[PackedTensors] = []
    solved: list[QuantizedLinear] = []
    for piece in rows.solved(work.options.team, torch.split(weight, HEAD_ROWS), work.device):
        (found,) = piece.linears
        pieces.append(pack(found, config.bits, work.options.config.checkpoint_format))
        # the codes are packed: what goes on is the account
        solved.append(replace(found, codes=found.codes[:0], scales=found.scales[:0], zeros=found.zeros[:0]))
    return joined(solved), PackedTensors(
        qweight=torch.cat([piece.qweight for piece in pieces], 1),
        qzeros=torch.cat([piece.qzeros for piece in pieces], 1),
        scales=torch.cat([piece.scales for piece in pieces], 1),
        g_idx=pieces[0].g_idx,
    )
