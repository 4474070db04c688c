"""Kernels of the gptqmodel package, pretended: the interface is that of 7.6, the kernel is exact."""

from __future__ import annotations

import enum
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.errors import CheckpointError, ConfigError
from gptq_cli.gptq.packing import unpack_rows
from gptq_cli.inference.load import kernel_counts, load_quantized
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.placement import Placement, PlacementEntry
from tests.checkpoint.checkpoints import Recipe, dense_copy, quantize_directory, write_config
from tests.conftest import TinyFactory
from tests.inference.test_load import as_gptqmodel_writes_it, close_logits, load, logits


class FORMAT(enum.StrEnum):
    """As there."""

    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"


class ExactLinear(nn.Module):
    """A kernel that reads zeros as v2 stores them and takes everything but groups of 16."""

    REQUIRES_FORMAT_V2 = True
    ready = False

    def __init__(
        self,
        *,
        bits: int,
        group_size: int,
        desc_act: bool,
        sym: bool,
        pack_dtype: torch.dtype,
        dtype: torch.dtype,
        in_features: int,
        out_features: int,
        bias: bool,
        name: str,
        backend: str,
        register_buffers: bool,
        adapter: None,
        format: FORMAT,  # noqa: A002  # its name there
    ) -> None:
        super().__init__()
        assert register_buffers
        self.bits = bits
        group = in_features if group_size == -1 else group_size
        groups = -(-in_features // group)
        words = torch.zeros(in_features * bits // 32, out_features, dtype=torch.int32)
        self.register_buffer("qweight", words)
        self.register_buffer("qzeros", torch.zeros(groups, out_features * bits // 32, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(in_features, dtype=torch.int32))
        if bias:
            self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        assert self.ready, "post_init comes first"
        codes = unpack_rows(self.qweight, self.bits, len(self.g_idx)).float()
        zeros = unpack_rows(self.qzeros.t().contiguous(), self.bits, self.scales.shape[1]).t().float()
        weight = (codes - zeros[self.g_idx.long()]) * self.scales.float()[self.g_idx.long()]
        product = x.float() @ weight
        return (product + self.bias if hasattr(self, "bias") else product).to(x.dtype)


class WrongLinear(ExactLinear):
    """Forgets the zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class BrokenLinear(ExactLinear):
    """Accepts what it cannot do."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("expect qGroupSize to be 64\nin C++")


class Picky(ExactLinear):
    """Finds out late that it cannot."""

    def __init__(self, **fields: Any) -> None:
        raise NotImplementedError("not on this machine")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[type[nn.Module]]:
    """The kernels that the pretended package knows, best first."""
    known: list[type[nn.Module]] = [ExactLinear]

    def select_quant_linear(**asked: Any) -> list[type[nn.Module]]:
        assert asked["multi_select"]
        assert asked["device"] == torch.device("cpu")
        if asked["bits"] == 2:
            raise ValueError("no kernel for 2 bits")
        return known

    def validate_quant_linear(cls: type, **asked: Any) -> tuple[bool, Exception | None]:
        fits = asked["group_size"] != 16
        return fits, None if fits else NotImplementedError("group_size = 16")

    def to_v2(module: Any, *, bits: int, pack_dtype: torch.dtype) -> None:
        assert pack_dtype == torch.int32
        module.qzeros += sum(1 << shift for shift in range(0, 32, bits))

    def post_init(model: nn.Module, *, use_act_order: bool) -> None:
        for module in model.modules():
            if isinstance(module, ExactLinear):
                module.ready = True

    contents: dict[str, dict[str, Any]] = {
        "gptqmodel": {},
        "gptqmodel.utils": {},
        "gptqmodel.quantization": {"FORMAT": FORMAT, "METHOD": enum.Enum("METHOD", {"GPTQ": "gptq"})},
        "gptqmodel.utils.backend": {"BACKEND": enum.Enum("BACKEND", {"AUTO": "auto"})},
        "gptqmodel.utils.importer": {
            "select_quant_linear": select_quant_linear,
            "validate_quant_linear": validate_quant_linear,
        },
        "gptqmodel.utils.model": {
            "convert_gptq_v1_to_v2_format_module": to_v2,
            "hf_gptqmodel_post_init": post_init,
        },
    }
    for name, held in contents.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__dict__.update(held)
        monkeypatch.setitem(sys.modules, name, module)
    return known


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(group_size=32),
        Recipe(group_size=32, sym=False, version="gptq_v2"),
        Recipe(bits=8, group_size=-1),
        Recipe(group_size=32, desc_act=True),
    ],
)
def test_the_same_numbers(
    recipe: Recipe, kernels: list[type[nn.Module]], tiny_llama: Path, tmp_path: Path
) -> None:
    weights = quantize_directory(tiny_llama, tmp_path / "q", recipe)
    model = load(tmp_path / "q", kernel_choice="gptqmodel")
    assert close_logits(logits(model), logits(dense_copy(tiny_llama, weights, torch.float32)), 1e-4)
    (count,) = kernel_counts(model)
    assert (count.kernel, count.linears, count.reason) == ("gptqmodel", 21, "requested, ExactLinear")


@pytest.mark.parametrize("quantizer", ["gptqmodel:7.6.0", "tests:1.0"])
def test_zeros_of_0_in_asymmetric_codes(
    quantizer: str, kernels: list[type[nn.Module]], tiny_llama: Path, tmp_path: Path
) -> None:
    """The package adds to whole words in every checkpoint: it gets the words that it would have written."""
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32, sym=False, version="gptq_v2"))
    copied = as_gptqmodel_writes_it(tmp_path / "q", 4, quantizer)
    assert close_logits(logits(load(copied, kernel_choice="gptqmodel")), logits(load(copied)), 1e-4)


@pytest.mark.parametrize("said", ["gptq", "gptq_v2"])
def test_symmetric_zeros_under_a_wrong_name(
    said: str, kernels: list[type[nn.Module]], tiny_llama: Path, tmp_path: Path
) -> None:
    stored = "gptq" if said == "gptq_v2" else "gptq_v2"
    weights = quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32, version=stored))
    write_config(tmp_path / "q", Recipe(group_size=32, version=said))
    model = load(tmp_path / "q", kernel_choice="gptqmodel")
    dense = dense_copy(tiny_llama, weights, torch.float32)
    assert close_logits(logits(model), logits(dense), 1e-4)
    assert model.num_parameters() == dense.num_parameters()


@pytest.mark.parametrize("name", ["qwen2", "mixtral", "gpt2"])
def test_biases_experts_and_conv1d(
    name: str, kernels: list[type[nn.Module]], tiny: TinyFactory, tmp_path: Path
) -> None:
    conv1d = name == "gpt2"
    weights = quantize_directory(tiny(name), tmp_path / "q", Recipe(group_size=32), transposed=conv1d)
    expected = dense_copy(tiny(name), weights, torch.float32, transposed=conv1d)
    assert close_logits(logits(load(tmp_path / "q", kernel_choice="gptqmodel")), logits(expected), 1e-3)


def test_it_is_not_installed(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="gptqmodel is not installed") as caught:
        load(tmp_path / "q", kernel_choice="gptqmodel")
    assert (caught.value.hint or "").startswith("pip install gptqmodel, or use --kernel auto")


def test_another_version_is_installed(
    kernels: list[type[nn.Module]], monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path
) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    monkeypatch.delattr(sys.modules["gptqmodel.utils.importer"], "validate_quant_linear")
    with pytest.raises(ConfigError, match="cannot be used: cannot import name 'validate_quant_linear'"):
        load(tmp_path / "q", kernel_choice="gptqmodel")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(group_size=16), "gptqmodel has no kernel for model.layers.0.*: group_size = 16"),
        (Recipe(bits=2, group_size=32), "no kernel for 2 bits"),
        (Recipe(group_size=24), "size mismatch"),
    ],
)
def test_what_it_does_not_take_is_named(
    recipe: Recipe, message: str, kernels: list[type[nn.Module]], tiny_llama: Path, tmp_path: Path
) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", recipe)
    if recipe.group_size == 24:
        kernels[0] = type("Floor", (ExactLinear,), {"__init__": floor_groups})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "q", kernel_choice="gptqmodel")


def floor_groups(self: Any, **fields: Any) -> None:
    """Rounds the number of groups down."""
    rows = fields["in_features"] // fields["group_size"] * fields["group_size"]
    ExactLinear.__init__(self, **(fields | {"in_features": rows}))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [(WrongLinear, "the output of WrongLinear is off by 50%"), (BrokenLinear, "fails: expect qGroupSize")],
)
def test_a_kernel_that_computes_something_else_is_refused(
    kernel: type[nn.Module],
    message: str,
    kernels: list[type[nn.Module]],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    kernels[0] = kernel
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "q", kernel_choice="gptqmodel")


def test_the_next_best_kernel_is_taken(
    kernels: list[type[nn.Module]], tiny_llama: Path, tmp_path: Path
) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    kernels.insert(0, Picky)
    assert (
        kernel_counts(load(tmp_path / "q", kernel_choice="gptqmodel"))[0].reason == "requested, ExactLinear"
    )


def test_modules_that_travel_cannot_have_it(
    kernels: list[type[nn.Module]], tiny_llama: Path, tmp_path: Path
) -> None:
    quantize_directory(tiny_llama, tmp_path / "q", Recipe(group_size=32))
    checkpoint = open_checkpoint(tmp_path / "q")
    other = Device.parse("cuda:0")
    entries = (PlacementEntry("model", other, 1, True), PlacementEntry("lm_head", CPU, 1, True))
    with pytest.raises(ConfigError, match="cannot be moved"):
        load_quantized(checkpoint, Placement(entries, other, "test"), kernel_choice="gptqmodel")
