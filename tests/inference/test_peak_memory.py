"""Loading takes the packed model and little more, at its highest. Measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.checkpoint.checkpoints import Recipe, write_config

SIZE, LAYERS = 4096, 3
MEASURE = """
import json, sys
from transformers import LlamaForCausalLM
from gptq_cli.inference.load import default_placement, load_quantized, resident_bytes
from gptq_cli.checkpoint.open import open_checkpoint

def status(key):
    text = open("/proc/self/status").read()
    return 1024 * int(text.split(key + ":")[1].split()[0])

checkpoint = open_checkpoint(sys.argv[1], dtype="bfloat16")
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model = load_quantized(checkpoint, default_placement(checkpoint))
print(json.dumps({
    "peak": status("VmHWM") - before,
    "after": status("VmRSS") - before,
    "weights": resident_bytes(model),
    "file": checkpoint.packed_bytes,
}))
"""


def write_large(path: Path) -> None:
    """A checkpoint of random words: 21 linears of 4096 x 4096, nothing that takes time to make."""
    config = transformers.LlamaConfig(
        hidden_size=SIZE,
        intermediate_size=SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=512,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(path)
    with torch.device("meta"):
        names = transformers.LlamaForCausalLM(config).state_dict()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in names.items():
        linear = name.removesuffix(".weight")
        if not linear.endswith("_proj"):
            tensors[name] = torch.ones(tensor.shape, dtype=torch.bfloat16)
            continue
        words = (SIZE // 8, SIZE)
        tensors[f"{linear}.qweight"] = torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32)
        tensors[f"{linear}.qzeros"] = torch.full((SIZE // 128, SIZE // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{linear}.scales"] = torch.full((SIZE // 128, SIZE), 0.01, dtype=torch.float16)
        tensors[f"{linear}.g_idx"] = (torch.arange(SIZE) // 128).int()
    save_file(tensors, path / "model.safetensors")
    write_config(path, Recipe(group_size=128))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_the_packed_model_and_one_linear(tmp_path: Path) -> None:
    write_large(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    dense_linear = 2 * SIZE * SIZE
    slack = 40 << 20  # modules that are imported on the way, the probe, what is freed and not yet given back
    assert found["weights"] < 1.03 * found["file"]
    assert found["after"] < found["weights"] + slack
    assert found["peak"] < found["file"] + dense_linear + slack
