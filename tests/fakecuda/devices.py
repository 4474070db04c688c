"""The make-believe devices: put in place before torch is imported, and held from outside.

    devices = install([2 << 30, 2 << 30])  # before `import torch`
    devices.squeeze(0, 4096)               # the next 4 KiB are the last that cuda:0 gives

What Python's torch.cuda asks of torch._C is answered here, so that torch.cuda, torch.accelerator, accelerate
and Transformers run their own code for CUDA.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.fakecuda.build import build, torch_folder

if TYPE_CHECKING:
    import torch

CAPABILITY = (8, 0)
_installed: list[Devices] = []


@dataclass(frozen=True, slots=True)
class Properties:
    """What torch.cuda.get_device_properties says, as far as anyone asks."""

    name: str
    total_memory: int
    major: int
    minor: int
    multi_processor_count: int = 1
    warp_size: int = 32
    is_integrated: bool = False
    gcnArchName: str = ""  # noqa: N815 - torch's name


class Devices:
    """cuda:0, cuda:1, … as they are seen from outside."""

    def __init__(self, library: ctypes.CDLL, sizes: Sequence[int]) -> None:
        self._library = library
        self._sizes: tuple[int, ...] = ()
        self._capability = CAPABILITY
        self.resize(sizes)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._sizes)

    @property
    def flushes(self) -> int:
        """How often the caches were emptied, since the process began."""
        return int(self._library.fake_flushes())

    def ooms(self, index: int) -> int:
        """How often a device refused, since the process began."""
        return int(self._library.fake_ooms(index))

    @property
    def pinned(self) -> int:
        """Bytes of main memory that are pinned now."""
        return int(self._library.fake_pinned())

    @property
    def most_pinned(self) -> int:
        """The most that was pinned at once, since the process began or `forget_pinned`."""
        return int(self._library.fake_most_pinned())

    @property
    def copies(self) -> int:
        """Copies from pinned memory that the devices have yet to make."""
        return int(self._library.fake_copies())

    def forget_pinned(self) -> None:
        """Start a new `most_pinned`."""
        self._library.fake_forget_pinned()

    def resize(self, sizes: Sequence[int], capability: tuple[int, int] = CAPABILITY) -> None:
        """Be cuda:0, cuda:1, … of so many bytes and this compute capability."""
        most = int(self._library.fake_most_devices())
        if not 0 < len(sizes) <= most:
            raise ValueError(f"{len(sizes)} devices; allowed: 1 to {most}")
        self._sizes, self._capability = tuple(sizes), capability
        self._library.fake_set_devices(len(sizes), (ctypes.c_size_t * len(sizes))(*sizes))
        if "torch" in sys.modules:
            sys.modules["torch"].cuda._cached_device_count = None

    def properties(self, index: int) -> Properties:
        """See `Properties`."""
        return Properties(f"make-believe {index}", self._sizes[index], *self._capability)

    def squeeze(self, index: int, spare_bytes: int) -> None:
        """Leave `spare_bytes` beside what is allocated now. The cache is given up; no flush is counted."""
        import torch

        self._library.fake_drop_cache(index)
        self.allow(index, torch.cuda.memory_allocated(index) + spare_bytes)

    def allow(self, index: int, size_bytes: int) -> None:
        """Give at most so many bytes in all, whatever the device says that it has."""
        self._library.fake_allow(index, size_bytes)

    def relax(self) -> None:
        """Give everything again, and forget what is cached."""
        for index, size in enumerate(self._sizes):
            self._library.fake_drop_cache(index)
            self.allow(index, size)

    def default_generators(self) -> tuple[torch.Generator, ...]:
        """Those that random operators draw from where none is given."""
        import torch

        self._library.fake_give_defaults(True)
        try:
            most = int(self._library.fake_most_devices())
            return tuple(torch.Generator(f"cuda:{index}") for index in range(most))
        finally:
            self._library.fake_give_defaults(False)

    def answers(self) -> dict[str, Callable[..., Any]]:
        """What a CUDA build of torch has in torch._C, by name."""
        library = self._library
        return {
            # plain functions: torch.compile puts them into tables, and those of ctypes have no hash
            "_cuda_getDeviceCount": lambda: library.fake_count(),
            "_cuda_init": lambda: None,
            "_cuda_getDevice": lambda: library.fake_current(),
            "_cuda_setDevice": lambda index: library.fake_exchange(index) and None,
            "_cuda_exchangeDevice": lambda index: library.fake_exchange(index),
            "_cuda_maybeExchangeDevice": lambda index: library.fake_exchange(index),
            "_cuda_synchronize": lambda: library.fake_synchronize(),
            "_cuda_setMemoryFraction": lambda fraction, index: self.allow(
                index, int(self._sizes[index] * fraction)
            ),
            "_cuda_getAllocatorBackend": lambda: "native",
            "_cuda_getCurrentStream": lambda index: (0, index, 1),
            "_cuda_getCurrentRawStream": lambda index: 0,
            "_cuda_isCurrentStreamCapturing": lambda: False,
            "_cuda_getArchFlags": lambda: "sm_{}{}".format(*self._capability),
            "_cuda_hasPrimaryContext": lambda index: True,
            "_accelerator_emptyHostCache": lambda: None,  # nothing that was pinned is kept
        }


def installed() -> Devices | None:
    """The devices of this process; None where there are none."""
    return _installed[0] if _installed else None


def install(sizes: Sequence[int]) -> Devices:
    """Have devices of `sizes` bytes. Once a process, before torch is imported."""
    if _installed or "torch" in sys.modules:
        raise RuntimeError("install() must come once, and before torch is imported")
    library_of_torch = torch_folder() / "lib"
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(library_of_torch / name), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(build()))  # torch asks for its hooks once: they must be there when it does
    for name in ("fake_flushes", "fake_ooms", "fake_pinned", "fake_most_pinned", "fake_copies"):
        getattr(library, name).restype = ctypes.c_int64
    library.fake_allow.argtypes = [ctypes.c_int, ctypes.c_size_t]
    library.fake_give_defaults.argtypes = [ctypes.c_bool]
    devices = Devices(library, sizes)
    _installed.append(devices)
    _answer_for(devices)
    from tests.fakecuda import operators

    operators.register()
    return devices


def _answer_for(devices: Devices) -> None:
    """Put `devices` behind torch.cuda."""
    import torch

    core: Any = torch._C
    for name, answer in devices.answers().items():
        setattr(core, name, answer)
    core._cuda_emptyCache = core._accelerator_emptyCache
    core._cuda_memoryStats = core._accelerator_getDeviceStats
    core._cuda_resetPeakMemoryStats = core._accelerator_resetPeakStats

    cuda: Any = torch.cuda
    cuda._exchange_device = cuda._maybe_exchange_device = core._cuda_exchangeDevice
    cuda._cudart = object()
    cuda._device_count_nvml = lambda: -1
    cuda._queued_calls.clear()
    cuda._get_device_properties = devices.properties
    cuda.default_generators = devices.default_generators()
    cuda.mem_get_info = lambda device=None: torch.accelerator.get_memory_info(
        cuda._utils._get_device_index(device, optional=True)
    )
    cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.version.cuda = "13.0"
    _copy_without_storages()


def _copy_without_storages() -> None:
    """`copy.deepcopy` of a tensor of a device: storages know CUDA's allocator only in a CUDA build."""
    import torch

    plain = {kind: kind.__deepcopy__ for kind in (torch.nn.Parameter, torch.Tensor)}

    def copied(self: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        kind = torch.nn.Parameter if isinstance(self, torch.nn.Parameter) else torch.Tensor
        if self.device.type != "cuda" or not self.is_leaf:
            return plain[kind](self, memo)
        if id(self) in memo:
            return memo[id(self)]
        with torch.no_grad():
            made = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device)
            made.copy_(self)
        if kind is torch.nn.Parameter:
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    torch.Tensor.__deepcopy__ = torch.nn.Parameter.__deepcopy__ = copied
