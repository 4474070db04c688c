"""One thread at a time makes models, and what was silenced speaks again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import logging

from gptq_cli.config import ModelRef
from gptq_cli.model.find import find_model
from gptq_cli.model.quiet import quiet_libraries
from gptq_cli.model.skeleton import open_skeleton
from tests.conftest import TinyFactory


def test_another_thread_waits() -> None:
    entered = threading.Event()

    def other() -> None:
        with quiet_libraries():
            entered.set()

    thread = threading.Thread(target=other)
    with quiet_libraries(), quiet_libraries():
        thread.start()
        assert not entered.wait(0.2)
    thread.join(10)
    assert entered.is_set()


def test_the_verbosity_comes_back() -> None:
    before = logging.get_verbosity()
    with quiet_libraries():
        assert logging.get_verbosity() == logging.ERROR
    assert logging.get_verbosity() == before


def test_threads_that_open_models_at_once_leave_ties_as_they_are(tiny: TinyFactory) -> None:
    """Transformers swaps `tie_weights` of the class meanwhile."""
    path: Path = tiny("llama_tied")
    original = PreTrainedModel.tie_weights

    def tied(_: int) -> int:
        ref = ModelRef(model=str(path))
        return len(open_skeleton(find_model(ref), ref).tied)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(tied, range(16))) == {1}
    assert PreTrainedModel.tie_weights is original
