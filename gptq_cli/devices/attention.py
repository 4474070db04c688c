"""Attention on CUDA in a program of many short-lived threads.

Where cuDNN computes attention (torch's first choice on Hopper), it plans before the first call, which takes
some 50 ms, and torch keeps the plans of each thread apart. A forward that waits between two stages runs in a
thread of its own, so every one of them would plan again: more than half of the time of an 8B's block on an
H200. Torch's own kernels need no plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def attention_without_plans() -> Iterator[None]:
    """Inside the `with`, in all threads, attention on CUDA is computed by torch's own kernels."""
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
