"""Gradients that are the same every time, on an accelerator too.

Attention kernels add up the gradients of queries in the order in which parts of them are finished. Torch has
kernels that do not, for a little time, and takes them where it is told to. A few functions have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Inside the `with`, kernels on the accelerator `device` give the same bits every time. A function that
    has no such kernel raises a `RuntimeError` of which `not_deterministic` is true."""
    before = torch.get_deterministic_debug_mode()
    if device.type == "cpu" or before:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def not_deterministic(error: RuntimeError) -> bool:
    """Whether torch has no kernel that gives the same bits every time."""
    return "use_deterministic_algorithms" in str(error)
