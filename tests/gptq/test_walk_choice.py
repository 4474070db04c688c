"""Which walk runs where, and that what fails is never silent."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq import solver, walk_choice
from gptq_cli.gptq.grid import Grid
from gptq_cli.gptq.solver import quantize_linears
from gptq_cli.gptq.walk import SolveRun, SweepRun, TorchWalk, Walk, long_torch_walk
from gptq_cli.gptq.walk_choice import Guarded, WalkWarning, walk_on
from gptq_cli.gptq.walk_graph import GraphWalk
from tests.gptq.cases import activations, weights

CUDA = torch.device("cuda", 0)


class Kernel:
    """Does as torch does, or raises from a given launch on."""

    name = "triton"
    columns = 128

    def __init__(self, launches: int = 1 << 30, error: Exception | None = None) -> None:
        self._left = launches
        self._error = error or RuntimeError("PassManager::run failed\nat line 7")
        self._torch = long_torch_walk()

    def _launch(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise self._error

    def solve(self, run: SolveRun, grid: Grid) -> None:
        self._launch()
        self._torch.solve(run, grid)

    def sweep(self, run: SweepRun, grid: Grid) -> None:
        self._launch()
        self._torch.sweep(run, grid)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`card(capability=…, triton=…, kernel=…)`: what there is instead of a card; its tensors are a CPU's."""

    def made(capability: tuple[int, int] = (9, 0), triton: bool = True, kernel: Any = Kernel) -> None:
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(walk_choice, "find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr(walk_choice, "_triton_walk", kernel)
        monkeypatch.setattr(walk_choice, "_graph_walk", lambda: GraphWalk(record=replayed))
        real = walk_choice.differing
        monkeypatch.setattr(
            walk_choice, "differing", lambda walk, device: real(walk, torch.device("cpu"), 32)
        )

    walk_choice._found.cache_clear()
    yield made
    walk_choice._found.cache_clear()


def replayed(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """In place of a CUDA graph: the work is done again, on the tensors that it was recorded with."""
    work()
    return work


def problem(K: int = 40) -> tuple[list[torch.Tensor], torch.Tensor]:
    X = activations(200, K, dtype=torch.float32)
    return [weights(9, K, dtype=torch.float32), weights(4, K, seed=2, dtype=torch.float32)], X.T @ X / 200


def test_a_cpu_has_no_kernel_and_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk = walk_on(torch.device("cpu"), torch.float32)
    assert (walk.name, walk.columns) == ("torch", 16)


def test_a_card_has_triton_and_an_older_one_a_graph(card: Any) -> None:
    card()
    assert walk_on(CUDA, torch.float32).name == "triton"
    assert walk_on(CUDA, torch.float64).name == "torch"
    assert walk_on(torch.device("xpu", 0), torch.float32).name == "torch"
    assert walk_on(torch.device("mps"), torch.float32).name == "torch"


def test_an_older_card_has_a_graph(card: Any) -> None:
    card(capability=(7, 5))
    assert walk_on(CUDA, torch.float32).name == "cuda graph"


def test_a_card_without_triton_has_a_graph(card: Any) -> None:
    card(triton=False)
    assert walk_on(CUDA, torch.float32).name == "cuda graph"


def test_a_kernel_that_fails_its_trial_is_not_used_and_each_run_says_so(card: Any) -> None:
    card(kernel=lambda: Kernel(launches=0))
    for _ in range(2):
        with pytest.warns(
            WalkWarning, match=r"triton walk is not used: RuntimeError: PassManager::run failed;"
        ):
            walk = walk_on(CUDA, torch.float32)
        assert isinstance(walk, TorchWalk)


def test_a_kernel_that_gives_other_codes_is_not_used(card: Any) -> None:
    class Wrong(Kernel):
        def solve(self, run: SolveRun, grid: Grid) -> None:
            super().solve(run, grid)
            run.codes[0, 0] += 1

    card(kernel=Wrong)
    with pytest.warns(WalkWarning, match="on a small problem codes differ from those of torch"):
        assert walk_on(CUDA, torch.float32).name == "torch"


@pytest.mark.parametrize("launches", [0, 1, 3])
def test_a_kernel_that_raises_later_is_taken_over(launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes are those of a kernel that never failed, and the person is told."""
    W, H = problem()
    config = QuantizeConfig(group_size=8, column_batch=16)
    found = []
    for walk in (Guarded(Kernel()), Guarded(Kernel(launches))):
        monkeypatch.setattr(solver, "walk_on", lambda device, dtype, walk=walk: walk)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found.append(quantize_linears(W, H, config))
    assert [str(warning.message).split(";")[0] for warning in said] == [
        "the solver's triton walk is not used: RuntimeError: PassManager::run failed"
    ]
    assert walk.name == "torch"
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(*found, strict=True))


def test_out_of_memory_is_not_taken_for_a_broken_kernel() -> None:
    run = problem()
    walk = Guarded(Kernel(0, torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        walk.solve(run, Grid(bits=4, sym=True, positive_scales=False, search="minmax"))  # type: ignore[arg-type]


def test_a_recorded_walk_gives_the_codes_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one shape share a recording, whatever tensors they come with."""
    W, H = problem(70)
    recordings: list[torch.device] = []

    def record(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        recordings.append(device)
        return replayed(work, device)

    config = QuantizeConfig(group_size=16, column_batch=32, sym=False, sweeps=2)

    def solved(walk: Walk) -> Any:
        monkeypatch.setattr(solver, "walk_on", lambda device, dtype: walk)
        return quantize_linears(W, H, config)

    ours, theirs = solved(GraphWalk(record)), solved(long_torch_walk())
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(ours, theirs, strict=True))
    assert [a.loss for a in ours] == pytest.approx([b.loss for b in theirs], rel=1e-6)
    # solved: runs of 32 and of 6 columns; swept: groups of 16 and of 6
    assert len(recordings) == 4


def test_an_old_recording_does_not_answer_for_a_new_grid() -> None:
    walk, n = GraphWalk(replayed), 4
    B = torch.full((n, 2), 9.0)
    for bits, wanted in ((4, 7 + 8), (3, 3 + 4)):
        run = SolveRun(
            B=B.clone(), U=torch.eye(n), weight=torch.ones(n), S=torch.ones_like(B),
            Z=torch.full_like(B, 2.0 ** (bits - 1)), W=B.clone(), codes=B.to(torch.uint8), E=B.clone(),
            damped=torch.zeros(2),
        )  # fmt: skip
        walk.solve(run, Grid(bits=bits, sym=True, positive_scales=False, search="minmax"))
        assert bool((run.codes == wanted).all())
