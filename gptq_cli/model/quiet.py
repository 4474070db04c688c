"""Calling the libraries that make models: silently, from one thread at a time, and without a trace in the
global random numbers.

Our own events report progress, on the display that was chosen. And while Transformers makes or loads a
model it swaps functions of torch and of its own classes (`no_tie_weights`, `no_init_weights`) and puts
them back: if two threads do so at once, they may stay swapped, and every later model of the process is
made without its ties.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

import torch
from transformers.utils import logging as transformers_logging

_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence Transformers' progress bars and load reports, and accelerate's messages about its dispatch.

    Other threads wait here until the scope ends. Enter it before every other scope that swaps functions.
    """
    with _ONE_AT_A_TIME, _silence():
        yield


@contextlib.contextmanager
def quiet_log() -> Iterator[None]:
    """Keep back what Transformers logs in this thread, errors excepted: what matters of it is an event of
    ours. Other threads may do the same meanwhile, and need not wait."""
    thread = threading.get_ident()

    def speaks(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or threading.get_ident() != thread

    transformers_logging.get_logger()  # its handler is made by the first call
    handlers = tuple(logging.getLogger("transformers").handlers)
    for handler in handlers:
        handler.addFilter(speaks)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(speaks)


@contextlib.contextmanager
def no_random_traces() -> Iterator[None]:
    """Restore the CPU's global generator: Transformers draws from it for tensors that it re-creates."""
    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    accelerates = logging.getLogger("accelerate")
    level = accelerates.level
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    accelerates.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        accelerates.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
