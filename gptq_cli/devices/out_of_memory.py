"""Recognising out-of-memory errors.

There are many: each accelerator's allocator has an error of its own, torch's CPU allocator raises a
`RuntimeError`, Python a `MemoryError`, the kernel an `OSError` with ENOMEM where it cannot map a file, a
thread without memory for its stack "can't start", and libraries in Rust and C++ only say so in the message.
Code that opens a file or a model may wrap any of these in an error of its own, so the chain of causes is
searched, too. Nothing here imports torch: this must still work when there is no memory left to import it.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gptq_cli.errors import OutOfDeviceMemory

_SAID = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "unable to allocate",
    "can't start new thread",
    "out_of_memory",
    "out_of_device_memory",
    "out_of_host_memory",
    "bad_alloc",
    "bad allocation",
    "cublas_status_alloc_failed",
    "cusolver_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "threadpoolbuilderror",
    "the global thread pool has not been initialized",
)
_NOT_LOADED = ("failed to map segment from shared object", "cannot allocate memory")
"""How glibc's message ends when there is no memory for a library; with another end the cause is another."""
_RUST = ("SafetensorError", "PanicException", "Exception")
"""Classes that Rust libraries raise for every error."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if `error`, or an error in its chain of causes, means that any device is out of memory."""
    return out_of_memory_cause(error) is not None


def out_of_memory_cause(error: BaseException) -> BaseException | None:
    """The out-of-memory error in the chain of `error`; None if there is none."""
    return next((link for link in _chain(error) if _is_one(link)), None)


@contextmanager
def out_of_memory_told(doing: Callable[[], str], hint: str | Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error inside the `with` into `OutOfDeviceMemory`: exit code 4.

    `doing` says what was being done, "while opening the model"; `hint` what to change. The local variables in
    the error's tracebacks are cleared, so that keeping the error does not keep the model.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, OutOfDeviceMemory):
        raise
    except BaseException as error:  # a panic in a Rust library is not an Exception
        cause = out_of_memory_cause(error)
        if cause is None:
            raise
        lines = str(cause).strip().splitlines()
        said = lines[0] if lines else type(cause).__name__
        clear_frames(error)
        less = hint if isinstance(hint, str) else hint()
        raise OutOfDeviceMemory(f"out of memory {doing()}: {said}", hint=less) from error


def clear_frames(error: BaseException) -> None:
    """Clear the local variables in the tracebacks of `error`, so that keeping it does not keep a model."""
    for link in _chain(error):
        traceback.clear_frames(link.__traceback__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _is_one(error: BaseException) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, MemoryError | OutOfDeviceMemory) or "OutOfMemoryError" in kinds:
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError | ImportError) and type(error).__name__ not in _RUST:
        return False  # its message may quote a path, a key or a message of ours
    said = str(error).lower()
    if isinstance(error, ImportError):
        return said.endswith(_NOT_LOADED)
    return any(words in said for words in _SAID)
