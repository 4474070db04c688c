"""What measuring takes: tokens, memory that grows with the sets, time that grows with the work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptq_cli.model.facts import LinearFact
from gptq_cli.planning.measuring import (
    HESSIAN_TOKENS,
    MEASURED_TOKENS,
    _rounding_bytes,
    hessian_samples,
    measured_windows,
    measuring_needs,
    measuring_seconds,
    tokens_of,
)
from gptq_cli.planning.rates import MachineRates
from gptq_cli.preflight.resolve import resolve
from tests.preflight.shapes import case, llama

RATES = MachineRates(
    forward_rate=1e10, hessian_rate=1e10, matmul_rate=1e10, column_seconds=1e-4, weight_seconds=1e-8
)
HEAD = LinearFact(name="lm_head", block="", in_features=1024, out_features=32000)


def test_samples_are_shared_out() -> None:
    assert hessian_samples(128, 2048) == HESSIAN_TOKENS // 2048
    assert hessian_samples(8, 64) == 4  # as many are left to measure on
    assert hessian_samples(1, 64) == hessian_samples(2, 64) == 1
    count, length = measured_windows(100, 2048)
    assert count * length == MEASURED_TOKENS
    assert measured_windows(1, 48) == (1, 48)
    assert tokens_of(1, 48) == (48, 48)
    assert tokens_of(128, 2048) == (HESSIAN_TOKENS, MEASURED_TOKENS)


def needed(blocks: int, vocab: int, tokens: tuple[int, int]) -> int:
    facts = replace(llama(blocks=blocks, vocab=vocab), head=HEAD, uncalled=frozenset())
    asked = case("cpu", facts, "cpu=64GiB")
    resolved = resolve(asked.spec, facts, asked.budgets, work=asked.work)
    assert resolved.placement is not None
    assert resolved.schedule is not None
    (need,) = measuring_needs(facts, resolved.placement, resolved.schedule, resolved.devices, tokens)
    assert need.limit_bytes == resolved.devices[0].limit_bytes
    return need.needed_bytes


def test_a_block_that_stays_dense_needs_no_memory_to_solve() -> None:
    facts = llama(blocks=2)
    dense, kept = facts.blocks
    linears = tuple(linear for linear in facts.linears if linear.block != dense)
    asked = case("cpu", replace(facts, linears=linears), "cpu=64GiB")
    resolved = resolve(asked.spec, asked.facts, asked.budgets, work=asked.work)
    assert resolved.placement is not None
    assert resolved.schedule is not None
    assert _rounding_bytes(asked.facts, dense, resolved.schedule) == 0
    assert _rounding_bytes(asked.facts, kept, resolved.schedule) > 0


def test_memory_holds_a_stream_for_every_set_and_the_head() -> None:
    hidden, tokens = 2 * 1024, (8192, 256)
    streams = needed(12, 32000, tokens) - needed(10, 32000, tokens)
    assert streams == 2 * 4 * 256 * hidden  # two blocks of four sets
    larger = needed(12, 64000, tokens) - needed(12, 32000, tokens)
    assert larger >= 2 * 2 * 32000 * 1024  # the embedding and the head stay


def test_time_grows_with_tokens_sets_and_columns() -> None:
    facts = llama(blocks=4)
    base = measuring_seconds(facts, RATES, (8192, 256), HEAD)
    assert measuring_seconds(facts, RATES, (8192, 512), HEAD) > base
    assert measuring_seconds(facts, RATES, (16_384, 256), HEAD) > base
    assert measuring_seconds(facts, RATES, (8192, 256), None) < base
    deeper = measuring_seconds(llama(blocks=8), RATES, (8192, 0), None)
    assert deeper == pytest.approx(2 * measuring_seconds(facts, RATES, (8192, 0), None))  # no streams
