"""The kernels equal the torch form bit for bit. Not collected by itself: test_kernels.py runs it in a process
of its own, in Triton's interpreter on a CPU; scripts/gpu_check.sh runs it on a card."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq import solver, walk_choice
from gptq_cli.gptq.grid import Grid
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.gptq.solver import quantize_stages
from gptq_cli.gptq.walk import SolveRun, SweepRun, TorchWalk, Walk, long_torch_walk
from gptq_cli.gptq.walk_choice import differing, walk_on
from gptq_cli.gptq.walk_triton import TritonWalk
from tests.gptq.cases import activations, weights

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
ROWS = 64

pytestmark = pytest.mark.gpu


def kernel() -> Walk:
    """A wide tile: the interpreter takes as long for few rows as for many."""
    return TritonWalk(ROWS) if INTERPRETED else TritonWalk()


def stages(count: int, K: int, rows: tuple[int, ...]) -> tuple[list[list[Tensor]], Tensor]:
    W = [
        [weights(n, K, seed=10 * e + i, dtype=torch.float32).to(DEVICE) for i, n in enumerate(rows)]
        for e in range(count)
    ]
    X = [activations(2 * K + 30 * e, K, seed=e, dtype=torch.float32) for e in range(count)]
    return W, torch.stack([x.T @ x / len(x) for x in X]).to(DEVICE)


def solved(
    walk: Walk, W: list[list[Tensor]], H: Tensor, config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch
) -> list[QuantizedLinear]:
    monkeypatch.setattr(solver, "walk_on", lambda device, dtype: walk)
    return [linear for stage in quantize_stages(W, H, config) for linear in stage]


CASES: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"bits": bits} for bits in (2, 3, 4, 8)},
    **{f"{bits} bits asymmetric": {"bits": bits, "sym": False} for bits in (2, 3, 4, 8)},
    "one group": {"group_size": -1},
    "one group asymmetric desc_act": {"group_size": -1, "sym": False, "desc_act": True},
    "group 32": {"group_size": 32},
    "group 64": {"group_size": 64, "sym": False},
    "desc_act": {"desc_act": True},
    "desc_act wide batches": {"desc_act": True, "column_batch": 64},
    "no order": {"act_order": "none"},
    "no sweep": {"sweeps": 0, "refit": False},
    "refit alone": {"sweeps": 0, "refit": True},
    "thorough": {"sweeps": 3, "refit": True, "sym": False},
    "positive scales": {"positive_scales": True, "scale_search": "minmax"},
}


@pytest.mark.parametrize("name", CASES)
def test_codes_are_those_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """K is no multiple of the column batch, N is odd, two linears share a stage."""
    config = QuantizeConfig(**{"group_size": 16, "column_batch": 32} | CASES[name])
    W, H = stages(1, 45, (21, 10))
    ours = solved(kernel(), W, H, config, monkeypatch)
    theirs = solved(long_torch_walk(), W, H, config, monkeypatch)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(mine.codes, wanted.codes)
        assert torch.equal(mine.scales, wanted.scales)
        assert torch.equal(mine.zeros, wanted.zeros)
        assert torch.equal(mine.g_idx, wanted.g_idx)
        assert mine.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert mine.method == "gptq"


def test_a_whole_batch_of_128_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    config = QuantizeConfig(group_size=128)
    W, H = stages(1, 140, (33,))
    (mine,), (wanted,) = (solved(walk, W, H, config, monkeypatch) for walk in (kernel(), long_torch_walk()))
    assert torch.equal(mine.codes, wanted.codes)
    assert torch.equal(mine.scales, wanted.scales)


def test_experts_are_walked_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    config = QuantizeConfig(group_size=16, column_batch=32, sym=False)
    W, H = stages(3, 40, (7, 6))
    H[1, 5] = H[1, :, 5] = 0  # an input that is never anything but 0, in one of them
    ours, theirs = (solved(walk, W, H, config, monkeypatch) for walk in (kernel(), long_torch_walk()))
    assert len(ours) == 6
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(ours, theirs, strict=True))


def test_a_wider_batch_than_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of at most 128 columns, whatever the column batch."""
    config = QuantizeConfig(group_size=-1, column_batch=132, sweeps=0, refit=False)
    W, H = stages(1, 132, (5,))
    ours, theirs = (solved(walk, W, H, config, monkeypatch)[0] for walk in (kernel(), long_torch_walk()))
    assert torch.equal(ours.codes, theirs.codes)


def test_the_short_walk_of_a_cpu_agrees_up_to_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sums in another order and fuses products: of these codes at most one in a hundred may differ."""
    config = QuantizeConfig(group_size=16, column_batch=32)
    W, H = stages(1, 45, (31,))
    ours, theirs = (solved(walk, W, H, config, monkeypatch)[0] for walk in (kernel(), TorchWalk()))
    assert (ours.codes != theirs.codes).float().mean() <= 0.01
    assert ours.loss == pytest.approx(theirs.loss, rel=0.01)


def grid(sym: bool = True, bits: int = 4) -> Grid:
    return Grid(bits=bits, sym=sym, positive_scales=False, search="minmax")


def made_run(B: Tensor, sym: bool) -> SolveRun:
    n, N = B.shape[-2:]
    generator = torch.Generator().manual_seed(1)
    U = (0.1 * torch.randn(n, n, generator=generator)).tril().to(B.device)
    S = torch.full_like(B, 0.25) * (1 + torch.arange(N, device=B.device) % 3)
    return SolveRun(
        B=B.clone(), U=U, weight=torch.ones_like(U[0]), S=S, Z=torch.full_like(B, 8.0 if sym else 3.0),
        W=B.clone(), codes=torch.full(B.shape, 99, dtype=torch.uint8, device=B.device),
        E=torch.empty_like(B), damped=torch.ones(N, device=B.device),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("sym", [True, False])
def test_what_is_not_finite_is_what_torch_makes_of_it(sym: bool) -> None:
    B = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    B[0, 1], B[2, 2], B[3, 3] = torch.inf, -torch.inf, torch.nan
    B[1, 4], B[1, 5] = 3e38, -1e30  # finite, and beyond what the rounding trick takes
    ours, theirs = made_run(B, sym), made_run(B, sym)
    kernel().solve(ours, grid(sym))
    long_torch_walk().solve(theirs, grid(sym))
    assert torch.equal(ours.codes, theirs.codes)
    for name in ("W", "E", "damped"):
        mine, wanted = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=0, equal_nan=True)


def test_ties_round_to_even_as_in_torch() -> None:
    B = (torch.arange(-9, 10).float() / 2).repeat(4, 1).to(DEVICE)
    run = replace(made_run(B, True), S=torch.ones_like(B), U=torch.eye(4, device=DEVICE))
    kernel().solve(run, grid())
    assert torch.equal(run.codes.float() - 8, B.round().clamp(-8, 7))


def test_a_division_is_exactly_rounded() -> None:
    """Where an approximate quotient lies on the other side of a tie."""
    s = torch.linspace(0.01, 3, 401, device=DEVICE).half().float()
    w = torch.nextafter(2.5 * s, torch.zeros_like(s))
    B = w.expand(3, -1).contiguous()
    run = replace(made_run(B, True), S=s.expand(3, -1).contiguous(), U=torch.eye(3, device=DEVICE))
    kernel().solve(run, grid())
    assert torch.equal(run.codes.float() - 8, (B / run.S).round())


def test_a_sweep_writes_its_levels_and_changes_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 20, 13, generator=generator).to(DEVICE)
    L, H = torch.zeros(2, 20, 13, device=DEVICE), torch.eye(8, device=DEVICE).expand(2, 8, 8).contiguous()
    L += 1
    s = torch.full((2, 13), 0.5, device=DEVICE)
    part, C = slice(4, 12), torch.empty(2, 8, 13, device=DEVICE)
    kernel().sweep(SweepRun(L=L[:, part], G=whole[:, part], H=H, s=s, z=8 * torch.ones_like(s), C=C), grid())
    wanted = ((whole / 0.5)[:, part] + 1).round().clamp(-8, 7)
    assert torch.equal(L[:, part], wanted)
    assert torch.equal(C, (wanted - 1) / 2)
    assert bool((L[:, :4] == 1).all())
    assert bool((L[:, 12:] == 1).all())


def test_a_layout_that_a_kernel_does_not_read_is_refused() -> None:
    run = made_run(torch.randn(4, 6).to(DEVICE), True)
    with pytest.raises(ValueError, match="do not lie side by side"):
        kernel().solve(replace(run, B=run.B.T.contiguous().T), grid())


def test_the_trial_before_the_first_use_passes() -> None:
    assert differing(kernel(), DEVICE, columns=32) == ""


class NudgedWalk(TorchWalk):
    """The errors of a last column are off by one unit in the last place, as after another order of sums."""

    def solve(self, run: SolveRun, grid: Grid) -> None:
        super().solve(run, grid)
        last = run.E[..., -1, :]
        last.copy_(torch.nextafter(last, torch.full_like(last, torch.inf)))


def test_the_trial_sees_the_last_bit() -> None:
    """The check above can fail, also where a device happens to give the same sums in any order."""
    nudged = NudgedWalk(walk_choice.LONG_RUN, long_torch_walk()._subtract)
    assert "differ" in differing(nudged, DEVICE, columns=32)


@pytest.mark.skipif(not INTERPRETED, reason="an H200 gives the same bits in either order of this size")
def test_the_trial_sees_another_order_of_sums() -> None:
    assert "differ" in differing(TorchWalk(), DEVICE, columns=32)


@pytest.mark.skipif(INTERPRETED, reason="needs a card")
def test_a_card_walks_with_triton() -> None:
    walk_choice._found.cache_clear()
    assert walk_on(DEVICE, torch.float32).name == "triton"
