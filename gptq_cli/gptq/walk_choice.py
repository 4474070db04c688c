"""Which walk runs on which device: the only place that decides it.

    cpu, xpu, mps, …            torch
    cuda                        triton, where it is installed and the card is of capability 8.0 or newer
    cuda without that           cuda graph
    float64, anywhere           torch: only proofs are solved in it

A kernel that is compiled on the user's machine can fail in ways that no test has seen: no C compiler, a
driver too old, a card too new. So before the first use on a device the walk is tried on a small problem and
must give the codes of torch. Where it does not, and where it raises later, torch's operators do the work, and
a Python warning says so; a run shows it as any other warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from gptq_cli.gptq.grid import Grid
from gptq_cli.gptq.walk import LONG_RUN, SolveRun, SweepRun, TorchWalk, Walk, long_torch_walk

_MIN_CAPABILITY = (8, 0)
_TRIED_ROWS = 48


class WalkWarning(RuntimeWarning):
    """Columns are not walked in the fastest way that this device should allow."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What a device can do."""

    make: Callable[[], Walk]
    reason: str = ""
    """Why it is not what was promised."""


def walk_on(device: torch.device, dtype: torch.dtype) -> Walk:
    """The walk for tensors of `dtype` on `device`. Warns, each time, where it is slower than promised."""
    found = _found(device, dtype)
    if found.reason:
        warnings.warn(found.reason, WalkWarning, stacklevel=2)
    return found.make()


@cache
def _found(device: torch.device, dtype: torch.dtype) -> _Found:
    """A fact about the machine, so it is kept for the process."""
    built: bool = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
    if device.type != "cuda" or dtype != torch.float32 or not built:
        return _Found(TorchWalk)
    promised = _triton_walk if _has_triton(device) else _graph_walk
    try:
        trouble = differing(promised(), device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a compiler's errors are of every kind
        trouble = _first_line(error)
    if trouble:
        return _Found(TorchWalk, _said(promised().name, trouble))
    return _Found(lambda: Guarded(promised()))


def _has_triton(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY and find_spec("triton") is not None


def _triton_walk() -> Walk:
    from gptq_cli.gptq.walk_triton import TritonWalk

    return TritonWalk()


def _graph_walk() -> Walk:
    from gptq_cli.gptq.walk_graph import GraphWalk

    return GraphWalk()


class Guarded:
    """A walk that torch's operators take over from as soon as it raises."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk

    @property
    def name(self) -> str:
        """Of the walk that does the work now."""
        return self._walk.name

    @property
    def columns(self) -> int:
        """See `Walk.columns`."""
        return self._walk.columns

    def solve(self, run: SolveRun, grid: Grid) -> None:
        """See `Walk.solve`."""
        self._guarded(lambda walk: walk.solve(run, grid))

    def sweep(self, run: SweepRun, grid: Grid) -> None:
        """See `Walk.sweep`."""
        self._guarded(lambda walk: walk.sweep(run, grid))

    def _guarded(self, work: Callable[[Walk], None]) -> None:
        """A kernel raises when it is compiled or launched: nothing of the run has been touched by then."""
        try:
            work(self._walk)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - see `_found`
            warnings.warn(_said(self._walk.name, _first_line(error)), WalkWarning, stacklevel=4)
            self._walk = long_torch_walk()
            work(self._walk)


def differing(walk: Walk, device: torch.device, columns: int = LONG_RUN) -> str:
    """Try `walk` on a small problem: in which way it differs from torch, "" where it does not."""
    ours, theirs = (
        [_tried(one, device, columns, sym) for sym in (True, False)] for one in (walk, long_torch_walk())
    )
    for mine, wanted in zip(ours, theirs, strict=True):
        for name, tensor in wanted.items():
            if not torch.equal(mine[name], tensor):
                return f"on a small problem {name} differ from those of torch"
    return ""


def _tried(walk: Walk, device: torch.device, n: int, sym: bool) -> dict[str, torch.Tensor]:
    """What a walk gives for made-up columns."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    N, grid = _TRIED_ROWS, Grid(bits=4, sym=sym, positive_scales=False, search="minmax")
    B, s = made(n, N), made(N).abs().mul_(0.1).add_(0.1).half().float()
    z = torch.full_like(s, grid.half if sym else 5)
    U = made(n, n).mul_(0.1).tril_()
    U.diagonal().fill_(1)
    S, Z = s.expand(n, N).contiguous(), z.expand(n, N).contiguous()
    solved = SolveRun(
        B=B.clone(), U=U, weight=torch.ones_like(U[0]), S=S, Z=Z, W=B.clone(),
        codes=torch.zeros(n, N, dtype=torch.uint8, device=device), E=torch.empty_like(B),
        damped=torch.zeros_like(s),
    )  # fmt: skip
    walk.solve(solved, grid)
    H = U @ U.T
    H.diagonal().add_(1)
    L = solved.codes.float() - Z
    swept = SweepRun(L=L, G=made(n, N), H=H, s=s, z=z, C=torch.empty_like(B))
    walk.sweep(swept, grid)
    return {"codes": solved.codes, "errors": solved.E, "swept codes": swept.L}


def _said(name: str, trouble: str) -> str:
    return (
        f"the solver's {name} walk is not used: {trouble}; torch's operators compute the same, several times "
        "more slowly"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
