"""The torch walk as a CUDA graph: for CUDA devices without Triton.

A column costs several operators, each of which takes microseconds to launch and next to nothing to compute.
Recorded once, the operators of a whole run are launched as one. A graph reads and writes the addresses that
it was recorded with, so each run is copied into buffers of its own, and the results out of them; runs of one
shape share a graph. It lives as long as the solve of one stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from gptq_cli.gptq.grid import Grid
from gptq_cli.gptq.walk import LONG_RUN, SolveRun, SweepRun, long_torch_walk

Record = Callable[[Callable[[], None], torch.device], Callable[[], None]]
"""Takes work and a device; returns what does the work again, on the same tensors."""


def record_graph(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`work` as a CUDA graph. It runs once before: libraries set themselves up in their first call, which
    cannot be recorded."""
    with torch.cuda.device(device):
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            work()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    return graph.replay


class GraphWalk:
    """A recording for each shape of run."""

    name = "cuda graph"
    columns = LONG_RUN

    def __init__(self, record: Record = record_graph) -> None:
        self._record = record
        self._torch = long_torch_walk()
        self._recorded: dict[Any, tuple[Any, Callable[[], None]]] = {}

    def solve(self, run: SolveRun, grid: Grid) -> None:
        """See `Walk.solve`."""
        self._again(run, grid, self._torch.solve, ("W", "codes", "E", "damped"))

    def sweep(self, run: SweepRun, grid: Grid) -> None:
        """See `Walk.sweep`."""
        self._again(run, grid, self._torch.sweep, ("L", "C"))

    def _again(
        self, run: Any, grid: Grid, work: Callable[[Any, Grid], None], results: tuple[str, ...]
    ) -> None:
        """`work` on the recording's own tensors, then the `results` copied to where the run has them."""
        given: dict[str, Tensor] = {field.name: getattr(run, field.name) for field in fields(run)}
        shape = (type(run), grid, *(tuple(tensor.shape) for tensor in given.values()))
        if shape not in self._recorded:
            held = replace(run, **{name: tensor.clone() for name, tensor in given.items()})
            replay = self._record(lambda: work(held, grid), given[results[0]].device)
            self._recorded[shape] = (held, replay)
        held, replay = self._recorded[shape]
        for name, tensor in given.items():
            getattr(held, name).copy_(tensor)
        replay()
        for name in results:
            given[name].copy_(getattr(held, name))
