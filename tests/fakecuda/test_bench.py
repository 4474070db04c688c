"""scripts/bench_gpu.py and bench_streaming.py on a make-believe card: everything but the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent.parent
CODE = """
import runpy, sys
sys.path[:0] = ["scripts", "."]
from tests.fakecuda.devices import install
install([4 << 30, 4 << 30])
sys.argv = ["bench_gpu.py", "--tiny", "--no-peer"]
runpy.run_path("scripts/bench_gpu.py", run_name="__main__")
"""


def test_the_benchmark_runs_on_the_device() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["device"] == "make-believe 0"
    peaks = {peak["device"]: peak for peak in found["peaks"]}
    assert 0 < peaks["cuda:0"]["measured_bytes"] <= peaks["cuda:0"]["predicted_bytes"]
    assert found["phases_per_block"]["forward"] > 0


def test_main_memory_beside_a_device_is_measured() -> None:
    """Without what lies on the device."""
    words = ("--simulated", "--hidden", "256", "--inner", "512", "--vocab", "4096", "--limit-gib", "0")
    command = [sys.executable, "scripts/bench_streaming.py", *words, "--samples", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kept"]
    assert 0 < found["device_peak_bytes"] < found["peak_bytes"]
