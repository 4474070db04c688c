"""Fixtures shared by every room: tiny models, written once a session and never modified by a test."""

from __future__ import annotations

import gc
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers.utils import logging as transformers_logging

from gptq_cli.planning import rates
from tests.tiny import save_tiny

settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")  # a busy machine is no failure

transformers_logging.disable_progress_bar()
torch.set_num_threads(1)  # matrices are small here: two threads mostly wait for each other

MANY_OBJECTS = 20_000
"""Alive and not frozen: as many are traversed in a millisecond or two."""

TinyFactory = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def heard_signals() -> Iterator[None]:
    """Signals as a terminal leaves them: a shell starts what runs in the background with SIGINT ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if hasattr(signal, "SIGHUP"):
        usual[signal.SIGHUP] = signal.SIG_DFL
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def frozen() -> Iterator[None]:
    """A collection of garbage goes through a million objects of torch, Transformers and pytest otherwise, and
    each job asks for several: a fifth of the tests' time."""
    _freeze()
    yield
    gc.unfreeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Freeze what has come since: jobs import more of torch and Transformers when they run, and those objects
    cost each later job a tenth of its time, and more the longer the session."""
    if len(gc.get_objects(generation=2)) > MANY_OBJECTS:
        _freeze()


def _freeze() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_probe() -> Iterator[None]:
    """Each `--dry-run` times this machine for two seconds; here only the first of its kind does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "measure", cache(rates.measure))
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What models write in tests is not kept in the cache of whoever runs them."""
    before = os.environ.get("GPTQ_CACHE")
    os.environ["GPTQ_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["GPTQ_CACHE"]
    else:
        os.environ["GPTQ_CACHE"] = before


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFactory:
    """`tiny("qwen2", dtype=torch.bfloat16, seed=0, shards=1) -> Path`, cached for the session.

    The directory is shared: a test that wants to damage a model copies it first (`shutil.copytree`).
    """
    root = tmp_path_factory.mktemp("models")
    made: dict[tuple[object, ...], Path] = {}

    def make(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, shards: int = 1) -> Path:
        key = (name, dtype, seed, shards)
        if key not in made:
            folder = f"{name}-{str(dtype).removeprefix('torch.')}-{seed}-{shards}"
            made[key] = save_tiny(name, root / folder, dtype=dtype, seed=seed, shards=shards)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny: TinyFactory) -> Path:
    """Three Llama blocks in float32, one file."""
    return tiny("llama")


@pytest.fixture(scope="session")
def tiny_llama_sharded(tiny: TinyFactory) -> Path:
    """The same model in three shards with an index."""
    return tiny("llama", shards=3)


@pytest.fixture(scope="session")
def tiny_moe(tiny: TinyFactory) -> Path:
    """Two Qwen3-MoE blocks: one dense, one with fused experts."""
    return tiny("qwen3_moe")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate on."""
    from tests.e2e.commands import write_text

    return write_text(tmp_path_factory.mktemp("text") / "text.txt")
