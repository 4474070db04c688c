"""The faces of a lack of memory, and what only looks like one."""

from __future__ import annotations

import errno

import pytest
import torch

from gptq_cli.devices.out_of_memory import is_out_of_memory, out_of_memory_told
from gptq_cli.errors import CheckpointError, GptqError, ModelError, OutOfDeviceMemory, QualityGateFailed

CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


class SafetensorError(Exception):
    """As safetensors names its own."""


class PanicException(BaseException):
    """As PyO3 names what a library in Rust panics with."""


FACES = {
    "python": MemoryError(),
    "numpy": MemoryError("Unable to allocate 7.28 TiB for an array"),
    "cpu allocator": RuntimeError(CPU_ALLOCATOR),
    "cpu allocator of Windows": RuntimeError(
        "DefaultCPUAllocator: not enough memory: you tried to allocate 1"
    ),
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "driver": RuntimeError("CUDA error: out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"),
    "xpu": RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    "mmap": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "torch's mmap": RuntimeError("unable to mmap 1024 bytes from file <x>: Cannot allocate memory (12)"),
    "thread": RuntimeError("can't start new thread"),
    "safetensors": SafetensorError("Error: Cannot allocate memory (os error 12)"),
    "rust threads": PanicException("The global thread pool has not been initialized.: ThreadPoolBuildError"),
    "c++": RuntimeError("std::bad_alloc"),
    "a library": ImportError("tokenizers.abi3.so: failed to map segment from shared object"),
}
OTHERS = {
    "a file": FileNotFoundError(errno.ENOENT, "No such file", "/data/out of memory/x"),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "a key": KeyError("out of memory"),
    "our own words": ModelError("/data/out of memory has no config.json"),
    "a shape": RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    "a panic": PanicException("index out of bounds"),
    "a gate": QualityGateFailed("m"),
    "no leave": ImportError("x.so: failed to map segment from shared object: Operation not permitted"),
    "no library": ImportError("x.so: cannot allocate memory in static TLS block"),
}


def wrapped(error: BaseException) -> GptqError:
    """`error` as the cause of the cause of one of ours."""
    try:
        try:
            raise error
        except BaseException as first:
            raise ValueError("cannot be read") from first
    except ValueError as second:
        try:
            raise CheckpointError("tensor x cannot be read") from second
        except CheckpointError as third:
            return third


@pytest.mark.parametrize("name", FACES)
def test_every_face_is_known_and_so_is_what_was_made_of_it(name: str) -> None:
    assert is_out_of_memory(FACES[name])
    assert is_out_of_memory(wrapped(FACES[name]))


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_is(name: str) -> None:
    assert not is_out_of_memory(OTHERS[name])
    assert not is_out_of_memory(wrapped(OTHERS[name]))


def test_an_error_that_hides_its_context_has_none() -> None:
    with pytest.raises(ModelError) as caught:
        try:
            raise MemoryError
        except MemoryError:
            raise ModelError("m") from None
    assert not is_out_of_memory(caught.value)


def test_the_real_allocator() -> None:
    with pytest.raises(OutOfDeviceMemory, match="out of memory while trying: ") as caught:  # noqa: SIM117
        with out_of_memory_told(lambda: "while trying", "use less"):
            torch.empty(1 << 60, dtype=torch.uint8)
    assert (caught.value.exit_code, caught.value.hint) == (4, "use less")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), OutOfDeviceMemory("m"), *OTHERS.values()]
)
def test_everything_else_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, out_of_memory_told(lambda: "x", "h"):
        raise error
    assert caught.value is error
