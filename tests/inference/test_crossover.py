"""Where the fused kernel gives way to a GEMM."""

from __future__ import annotations

import pytest
import torch

from gptq_cli.inference import crossover
from gptq_cli.inference.crossover import Crossovers, crossing
from gptq_cli.inference.kernels import Dequantize, cpu_block
from tests.checkpoint.checkpoints import Recipe
from tests.inference.test_packed_linear import build


@pytest.mark.parametrize(
    ("fused", "dense", "tokens"),
    [
        ([1.0, 16.0], [6.0, 6.0], 12),  # 0.5 a token against a flat 6
        ([1.0, 31.0], [2.0, 17.0], 4),
        ([3.0, 60.0], [1.0, 1.0], 1),  # slower from the start: single tokens still read fewer bytes
        ([1.0, 1.0], [2.0, 3.0], 32),  # never worse
        ([2.0, 2.0], [1.0, 1.0], 1),
        ([1.0, 2.0], [900.0, 900.0], 32),
    ],
)
def test_crossing_of_two_lines(fused: list[float], dense: list[float], tokens: int) -> None:
    assert crossing(fused, dense) == tokens


def test_each_shape_class_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[int] = []

    def count(kernel: object, buffers: object, columns: int) -> int:
        probed.append(columns)
        return 7

    monkeypatch.setattr(crossover, "probe", count)
    first, _, _ = build(Recipe(group_size=32), rows=64)
    known = Crossovers()
    probed.clear()
    if not first.kernel.can_fuse:
        pytest.skip("no fused kernel on this machine")
    assert [known.max_fused_tokens(first.kernel, first.kernel_buffers) for _ in range(3)] == [7, 7, 7]
    assert probed == [64]
    other, _, _ = build(Recipe(group_size=64), rows=64)
    probed.clear()
    known.max_fused_tokens(other.kernel, other.kernel_buffers)
    assert probed == [64]


@pytest.mark.skipif(cpu_block() is None, reason="no fused kernel on this machine")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_probe_runs_both_ways(bits: int) -> None:
    linear, _, _ = build(
        Recipe(bits=bits, group_size=32, sym=False, version="gptq_v2"), rows=1100, columns=64
    )
    assert 1 <= linear.max_fused_tokens <= crossover.MAX_ROWS


def test_no_probe_without_a_fused_kernel() -> None:
    linear, _, _ = build(Recipe(group_size=32), dtype=torch.float32)
    assert isinstance(linear.kernel, Dequantize)
    assert Crossovers().max_fused_tokens(linear.kernel, linear.kernel_buffers) == 0


def test_the_probe_runs_with_the_threads_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(crossover, "probe", lambda *_: seen.append(torch.get_num_threads()) or 5)
    before = torch.get_num_threads()
    linear, _, _ = build(Recipe(group_size=32))
    if not linear.kernel.can_fuse:
        pytest.skip("no fused kernel on this machine")
    seen.clear()
    with crossover.intra_op_threads(1):
        assert Crossovers(threads=2).max_fused_tokens(linear.kernel, linear.kernel_buffers) == 5
        assert torch.get_num_threads() == 1
    assert seen == [2]
    assert torch.get_num_threads() == before
