"""A result that could not be opened again is never put in place."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.checkpoint import writer as writer_module
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.errors import GptqError
from tests.checkpoint.unquantized import opened, write_checkpoint
from tests.e2e.commands import FAST, gptq, write_text

Breaks = Callable[[pytest.MonkeyPatch], None]


def a_pattern_covers_a_quantized_linear(patch: pytest.MonkeyPatch) -> None:
    covers = {r"-:model\.layers\.\d+\.mlp(\..*)?$": {}}
    patch.setattr(writer_module, "declared_dynamic", lambda skeleton, changed: covers)


def the_config_says_other_bits(patch: pytest.MonkeyPatch) -> None:
    real = writer_module.quantization_dict

    def wrong(*args: Any, **fields: Any) -> dict[str, Any]:
        return real(*args, **fields) | {"bits": 8}

    patch.setattr(writer_module, "quantization_dict", wrong)


def the_config_is_another_models(patch: pytest.MonkeyPatch) -> None:
    real = writer_module.checkpoint_config

    def wrong(*args: Any, **fields: Any) -> dict[str, Any]:
        return real(*args, **fields) | {"intermediate_size": 96}

    patch.setattr(writer_module, "checkpoint_config", wrong)


def a_header_leaves_a_tensor_out(patch: pytest.MonkeyPatch) -> None:
    real = CheckpointWriter._open_shard

    def wrong(self: CheckpointWriter, shard: Any) -> None:
        real(self, shard)
        (length,) = struct.unpack("<Q", shard.header[:8])
        header = json.loads(shard.header[8 : 8 + length])
        header["other.qweight"] = header.pop("model.layers.0.self_attn.q_proj.qweight")
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length
        writer_module.write_at(self._files[shard.file], memoryview(text), 8)

    patch.setattr(CheckpointWriter, "_open_shard", wrong)


BROKEN: dict[Breaks, str] = {
    a_pattern_covers_a_quantized_linear: "`dynamic` says that",
    the_config_says_other_bits: "8 bits with group size",
    the_config_is_another_models: "need",
    a_header_leaves_a_tensor_out: "is missing",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda value: value.__name__)
def test_a_broken_result_is_not_put_in_place(
    breaks: Breaks, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = opened(tiny_llama)
    breaks(monkeypatch)
    with pytest.raises(GptqError, match="does not pass its own verification") as caught:
        write_checkpoint(skeleton, tmp_path / "out")
    assert type(caught.value) is GptqError
    assert BROKEN[breaks] in caught.value.message
    assert "(llama)" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_checkpoint_stays(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = opened(tiny_llama)
    write_checkpoint(skeleton, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    the_config_says_other_bits(monkeypatch)
    with pytest.raises(GptqError, match="does not pass its own verification"):
        write_checkpoint(skeleton, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_says_that_it_is_a_defect(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_text(tmp_path / "text.txt")
    a_pattern_covers_a_quantized_linear(monkeypatch)
    words = ("--out", tmp_path / "q", "--calibration", text, *FAST, "--recipe", "fast", "--json")
    ran = gptq("quantize", tiny_llama, *words)
    assert ran.code == 1
    assert "a defect of gptq" in ran.document["error"]["hint"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".q.gptq", "text.txt"]  # the blocks are kept
