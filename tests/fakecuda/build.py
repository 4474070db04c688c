"""fakecuda.cpp, compiled: once for each torch and each version of the source, in seconds, with plain g++.

Nothing here imports torch: the library must be loaded before it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "fakecuda.cpp"
CACHE = Path(__file__).parents[2] / ".fakecuda_cache"
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-attributes")
_ACCELERATED = ("libtorch_cuda.so", "libtorch_hip.so", "libtorch_xpu.so")


def torch_folder() -> Path:
    """Where the installed torch lies."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("torch is not installed")
    return Path(spec.submodule_search_locations[0])


def torch_version() -> str:
    """The version of the installed torch, with its build: "2.13.0+cpu"."""
    text = (torch_folder() / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^__version__ = ['\"](.+)['\"]", text, re.MULTILINE)
    if found is None:
        raise RuntimeError("torch/version.py does not say which version it is")
    return found[1]


def compiler() -> str | None:
    """The C++ compiler: `$CXX`, or the first that is on the path."""
    wanted = os.environ.get("CXX")
    names = (wanted,) if wanted else COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


def why_not() -> str | None:
    """Why there can be no make-believe CUDA here, in one clause; None where there can."""
    if sys.platform != "linux":
        return f"it is made for Linux, and this is {sys.platform}"
    own = [name for name in _ACCELERATED if (torch_folder() / "lib" / name).exists()]
    if own:
        return f"torch {torch_version()} is a build with {own[0]}, and it needs a CPU build"
    if not library().exists() and compiler() is None:
        return f"there is no C++ compiler ({os.environ.get('CXX') or ', '.join(COMPILERS)})"
    return None


def library() -> Path:
    """Where the library for this torch and this source lies, or would lie."""
    key = hashlib.sha256("\0".join((torch_version(), *FLAGS)).encode() + SOURCE.read_bytes())
    return CACHE / f"libfakecuda-{key.hexdigest()[:16]}.so"


def build() -> Path:
    """The library; compiled now where it is not there. Raises `CalledProcessError` where that fails."""
    made = library()
    if made.exists():
        return made
    cxx = compiler()
    if cxx is None:
        raise RuntimeError(why_not())
    torch = torch_folder()
    includes = (torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include")
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        fresh = Path(folder) / made.name
        command = [cxx, *FLAGS, *(word for path in includes for word in ("-isystem", str(path)))]
        command += [str(SOURCE), "-o", str(fresh), f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        os.replace(fresh, made)  # whole or not at all: several processes may build at once
    return made
