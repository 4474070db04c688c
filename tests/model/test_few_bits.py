"""Sources in few bits, from headers and configs alone: what they decode to, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.errors import ModelError
from gptq_cli.model.facts import TensorInfo
from gptq_cli.model.few_bits import decoded_files
from gptq_cli.model.few_bits_config import NotDecodableError, layouts_of
from gptq_cli.model.headers import DTYPES, TORCH_TO_SAFETENSORS
from gptq_cli.model.source import ModelFiles
from tests.encoders import STYLES, compressed

F8 = "float8_e4m3fn"
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def tensor(name: str, dtype: str, *shape: int) -> TensorInfo:
    size = DTYPES[TORCH_TO_SAFETENSORS[dtype]][1] // 4
    for length in shape:
        size *= length
    return TensorInfo(name, shape, dtype, size // 2, "model.safetensors")


def decoded(
    tmp_path: Path, config: Mapping[str, Any] | None, *tensors: TensorInfo
) -> tuple[ModelFiles, str | None]:
    files = ModelFiles(directory=tmp_path, source="model", tensors=tensors)
    return decoded_files(files, {} if config is None else {"quantization_config": config})


def test_a_dense_model_is_left_alone(tmp_path: Path) -> None:
    files, refused = decoded(tmp_path, None, tensor("a.weight", "bfloat16", 4, 4), tensor("n", "uint8", 4))
    assert [t.name for t in files.tensors] == ["a.weight", "n"]
    assert (files.decoded, files.problems, refused) == (None, (), None)


def test_weights_take_the_place_of_codes_and_scales(tmp_path: Path) -> None:
    files, refused = decoded(
        tmp_path,
        BLOCKS,
        tensor("norm.weight", "bfloat16", 200),
        tensor("a.weight", F8, 200, 300),
        tensor("a.weight_scale_inv", "float32", 2, 3),
        tensor("a.input_scale", "float32"),
        tensor("gate.weight", "bfloat16", 8, 200),
        tensor("gate.weight_scale_inv", "float32", 1, 2),
    )
    assert (files.problems, refused) == ((), None)
    assert [(t.name, t.dtype, t.shape, t.size_bytes) for t in files.tensors] == [
        ("norm.weight", "bfloat16", (200,), 400),
        ("a.weight", "bfloat16", (200, 300), 120_000),
        ("gate.weight", "bfloat16", (8, 200), 3200),
    ]
    assert files.tensors[1].stored_bytes == 60_000 + 24
    assert files.size_bytes == 400 + 60_024 + 3200
    source = files.decoded
    assert source is not None
    assert source.words == "fp8, a scale per 128 x 128, decoded to bfloat16 while read"
    assert (source.tensors, source.elements) == (1, 60_000)
    assert source.dropped == ("a.input_scale", "gate.weight_scale_inv")
    assert source.working_bytes == 120_000 + 60_024 + 16 * 60_000


@pytest.mark.parametrize(
    ("scale", "ending"),
    [
        ("float32", "_scale_inv"),
        ("bfloat16", "_scale_inv"),
        ("float8_e8m0fnu", "_scale_inv"),
        ("float32", "_scale"),
        ("float32", ".scale"),
        ("float32", ".qscale_weight"),
    ],
)
def test_names_and_dtypes_of_scales(scale: str, ending: str, tmp_path: Path) -> None:
    name = "a.weight" + ending if ending.startswith("_") else "a" + ending
    files, _ = decoded(tmp_path, BLOCKS, tensor("a.weight", F8, 130, 128), tensor(name, scale, 2, 1))
    assert files.problems == ()
    assert [t.name for t in files.tensors] == ["a.weight"]


def test_fused_experts(tmp_path: Path) -> None:
    files, _ = decoded(
        tmp_path,
        {"quant_method": "mxfp4"},
        tensor("e.gate_up_proj_blocks", "uint8", 4, 128, 2, 16),
        tensor("e.gate_up_proj_scales", "uint8", 4, 128, 2),
        tensor("e.gate_up_proj_bias", "bfloat16", 4, 128),
    )
    assert files.problems == ()
    assert [(t.name, t.shape) for t in files.tensors] == [
        ("e.gate_up_proj", (4, 64, 128)),
        ("e.gate_up_proj_bias", (4, 128)),
    ]
    files, _ = decoded(
        tmp_path,
        BLOCKS,
        tensor("e.down_proj", F8, 4, 200, 128),
        tensor("e.down_proj_scale_inv", "float32", 4, 2, 1),
    )
    assert [(t.name, t.shape) for t in files.tensors] == [("e.down_proj", (4, 200, 128))]


def test_a_layer_in_four_bits_beside_one_in_eight(tmp_path: Path) -> None:
    layers = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16}}
    files, _ = decoded(
        tmp_path,
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers},
        tensor("a.weight", F8, 64, 64),
        tensor("a.weight_scale", "float32"),
        tensor("b.weight", "uint8", 64, 32),
        tensor("b.weight_scale", F8, 64, 4),
        tensor("b.weight_scale_2", "float32"),
    )
    assert files.problems == ()
    assert files.decoded is not None
    assert files.decoded.words == "fp8, a scale per tensor and nvfp4, decoded to bfloat16 while read"
    assert [t.coded.block for t in files.tensors if t.coded] == [(0, 0), (1, 16)]


CODES, SCALE = tensor("a.weight", F8, 200, 300), tensor("a.weight_scale_inv", "float32", 2, 3)
NV4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
NV_CODES, NV_SCALE = tensor("a.weight", "uint8", 64, 32), tensor("a.weight_scale", F8, 64, 4)


@pytest.mark.parametrize(
    ("config", "tensors", "kind", "says"),
    [
        (None, [CODES], "unsupported-dtype", "a.weight is float8_e4m3fn, and config.json has no"),
        (
            None,
            [CODES, SCALE, replace(CODES, name="b.weight")],
            "unsupported-dtype",
            ", and 1 more tensor is in few bits",
        ),
        (None, [NV_CODES, NV_SCALE], "unsupported-dtype", "a.weight is uint8"),
        (BLOCKS, [CODES], "missing-scale", "a.weight is float8_e4m3fn and has no scale; looked for"),
        (BLOCKS, [CODES, replace(SCALE, shape=(3, 2))], "scale-mismatch", r"has shape \[3, 2\].*\[2, 3\]"),
        (BLOCKS, [CODES, replace(SCALE, shape=())], "scale-mismatch", r"has shape \[\]"),
        (BLOCKS, [CODES, replace(SCALE, dtype="int32")], "scale-mismatch", "is int32; allowed"),
        (BLOCKS, [NV_CODES, NV_SCALE], "unsupported-dtype", "explains fp8, a scale per 128 x 128"),
        (NV4, [NV_CODES, NV_SCALE], "missing-scale", "a.weight has no a.weight_scale_2"),
        (NV4, [CODES, SCALE], "unsupported-dtype", "explains nvfp4"),
        (
            NV4,
            [NV_CODES, replace(NV_SCALE, shape=(64, 2)), tensor("a.weight_scale_2", "float32")],
            "scale-mismatch",
            r"\[64, 2\].*\[64, 4\]",
        ),
        (
            NV4,
            [NV_CODES, NV_SCALE, tensor("a.weight_scale_2", "float32", 3)],
            "scale-mismatch",
            "allowed: one float",
        ),
        (
            {"quant_method": "mxfp4"},
            [tensor("a_blocks", "uint8", 4, 128, 2, 8), tensor("a_scales", "uint8", 4, 128, 2)],
            "scale-mismatch",
            "not that of mxfp4 weights",
        ),
        (
            {"quant_method": "mxfp4"},
            [tensor("a_blocks", "uint8", 4, 128, 2, 16)],
            "missing-scale",
            "a_scales",
        ),
        (
            BLOCKS,
            [CODES, SCALE, tensor("a.pre_quant_scale", "bfloat16", 300)],
            "unknown-scaling",
            "pre_quant",
        ),
        (BLOCKS, [CODES, SCALE, replace(CODES, name="a.bias", shape=(4,))], "unsupported-dtype", "a.bias"),
    ],
)
def test_what_is_wrong_is_named(
    config: Mapping[str, Any] | None, tensors: list[TensorInfo], kind: str, says: str, tmp_path: Path
) -> None:
    files, refused = decoded(tmp_path, config, *tensors)
    assert refused is None
    messages = [problem.message for problem in files.problems if problem.kind == kind]
    assert any(re.search(says, message) for message in messages), messages


@pytest.mark.parametrize("style", STYLES)
def test_every_config_is_understood(style: str) -> None:
    config = STYLES[style].config
    assert layouts_of(
        config if "quant_method" in config else {"quant_method": "modelopt", **config["quantization"]}
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
        ({"quant_method": "awq"}, "quant_method 'awq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
        ({"bits": 4}, "quant_method 'unknown'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size"),
        ({"quant_method": "fp8", "scale_fmt": "int4"}, "scale_fmt 'int4'"),
        ({"quant_method": "fp8", "expert_dtype": "int2"}, "expert_dtype 'int2'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "quant_algo 'NVFP4_AWQ'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size 32"),
        ({"quant_method": "modelopt"}, "quant_algo None"),
        (compressed("group", "pack-quantized", 4, type="int", group_size=128), "num_bits 4, type 'int'"),
        (compressed("channel", "int-quantized", 8, type="int"), "num_bits 8, type 'int'"),
        (compressed("tensor", "dense"), "format 'dense'"),
        (compressed("attn_head", "float-quantized"), "attn_head"),
        (compressed("tensor", "float-quantized") | {"config_groups": {}}, "no config_groups"),
        (
            compressed("tensor", "float-quantized") | {"transform_config": {"config_groups": {"R1": {}}}},
            "transform_config",
        ),
    ],
)
def test_what_is_not_decoded_is_refused_with_the_reason(
    config: Mapping[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(NotDecodableError, match=says):
        layouts_of(config)
    files, refused = decoded(tmp_path, config, CODES, SCALE)
    assert refused is not None
    assert says in refused
    assert files.tensors == (CODES, SCALE)


def test_a_config_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="allowed: an object"):
        decoded(tmp_path, [4])  # type: ignore[arg-type]
    (tmp_path / "hf_quant_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"hf_quant_config\.json cannot be read"):
        decoded(tmp_path, None, CODES)


@pytest.mark.parametrize("name", ["a.qweight", "a.weight_packed"])
def test_packed_codes_are_seen_without_a_config(tmp_path: Path, name: str) -> None:
    """AutoGPTQ kept its config in a file of its own."""
    files, refused = decoded(tmp_path, None, tensor("n.weight", "bfloat16", 8), tensor(name, "int32", 8, 8))
    assert (refused, files.problems) == (f"tensor {name} is int32", ())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "bitsandbytes"}, "describes a quantization (quant_method 'bitsandbytes')"),
        ({"quant_method": "gptq"}, "describes a quantization (quant_method 'gptq')"),
        ({"quant_method": "fp8"}, "describes a quantization (quant_method 'fp8')"),
        ({}, "names no quantization"),
    ],
    ids=["bitsandbytes", "gptq", "fp8", "empty"],
)
def test_a_config_that_was_left_over_is_said_and_not_followed(
    tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    """After QLoRA is merged, say."""
    dense = (tensor("a.weight", "bfloat16", 8, 8), tensor("position_ids", "int64", 1, 8))
    files, refused = decoded(tmp_path, config, *dense)
    assert (files.tensors, refused) == (dense, None)
    (problem,) = files.problems
    assert problem.kind == "left-over-config"
    assert says in problem.message


@pytest.mark.parametrize(
    ("config", "weight"),
    [
        ({"quant_method": "bitnet", "quantization_mode": "online"}, "bfloat16"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}},
            "bfloat16",
        ),
        ({"quant_method": "bitsandbytes"}, "uint8"),
        ({"quant_method": "gptq"}, "int32"),
    ],
    ids=str,
)
def test_weights_that_are_not_the_models_own_are_refused(
    tmp_path: Path, config: dict[str, Any], weight: str
) -> None:
    """Floats that are rounded or rotated back in every forward, and integers."""
    files, refused = decoded(tmp_path, config, tensor("a.weight", weight, 8, 8))
    assert files.problems == ()
    assert refused is not None
    assert config["quant_method"] in refused
