"""One transformer at several places of a model (Zamba2): quantized where it is used first, stored once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gptq_cli
from gptq_cli.checkpoint.open import open_checkpoint
from gptq_cli.checkpoint.target_facts import target_facts
from gptq_cli.engine import keep
from gptq_cli.inference.packed_linear import PackedLinear
from gptq_cli.jobs import keeping, snapshot_time
from gptq_cli.placement.placement import Placement
from gptq_cli.results.run import RunReport
from tests import architectures
from tests.second_opinion import save_source

SHARED = "shared_transformer.self_attn.q_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(architectures.build("zamba2"), tmp_path_factory.mktemp("zamba2"))


@dataclass(frozen=True)
class Made:
    """A checkpoint, its tensors, and what was reported."""

    out: Path
    tensors: dict[str, torch.Tensor]
    report: RunReport


def quantized(source: Path, out: Path) -> Made:
    text = str(source.parent / "text.txt")
    report = gptq_cli.quantize(
        source,
        out,
        device_map="cpu",
        calibration=text,
        samples=8,
        seq_len=64,
        group_size=16,
        recipe="balanced",
    )
    return Made(out, load_file(out / "model.safetensors"), report)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of a plain run; only read."""
    return quantized(source, tmp_path_factory.mktemp("expected") / "q")


def places(names: Any) -> set[str]:
    return {name.partition(".shared")[0] for name in names if SHARED in name}


def same(made: Made, expected: Made) -> bool:
    found, wanted = made.tensors, expected.tensors
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


def test_stored_once_and_read_at_every_place(expected: Made) -> None:
    stored = places(name for name in expected.tensors if name.endswith("qweight"))
    assert stored == {"model.layers.1"}
    model = gptq_cli.load(expected.out, device_map="cpu")
    shared = target_facts(open_checkpoint(expected.out)).shared
    assert f"model.layers.4.{SHARED}" in shared
    assert {name[:14] for name in shared} == {"model.layers.4"}
    first, second = (model.get_submodule(f"model.layers.{use}.{SHARED}") for use in (1, 4))
    assert first is second
    assert isinstance(first, PackedLinear)


def test_what_the_first_place_does_not_run_is_quantized_where_it_runs(expected: Made) -> None:
    """All adapters are at every place; each place runs its own."""
    adapters = {linear.name: linear for linear in expected.report.linears if "adapter_list" in linear.name}
    assert {name[:14] for name in adapters if ".gate_up_proj_adapter_list.0." in name} == {"model.layers.1"}
    assert {name[:14] for name in adapters if ".gate_up_proj_adapter_list.1." in name} == {"model.layers.4"}
    assert all(linear.method == "gptq" and not linear.routed for linear in adapters.values())


def test_weights_that_stay_in_memory_give_the_same(
    source: Path, expected: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Placement, "streams", lambda placement, block: False)
    assert same(quantized(source, tmp_path / "q"), expected)


@pytest.mark.parametrize(("resident", "snapshots"), [(False, False), (True, False), (True, True)])
def test_a_run_that_goes_on_gives_the_same(
    resident: bool,
    snapshots: bool,
    source: Path,
    expected: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped between the first use and the last."""
    if resident:
        monkeypatch.setattr(Placement, "streams", lambda placement, block: False)
    monkeypatch.setattr(snapshot_time, "SNAPSHOT_SHARE", 1e9 if snapshots else 0.0)
    monkeypatch.setattr(snapshot_time, "REDONE_SHARE", 0.0)
    blocks, real = 4, keeping.Keeping.keep

    def stop(keeper: Any, report: Any, states: Any) -> None:
        real(keeper, report, states)
        if len(keeper.finished) == blocks:
            raise RuntimeError("stopped")

    restored: list[int] = []
    real_catch_up: Callable[..., int] = keep.catch_up

    def catch_up(*words: Any) -> int:
        restored.append(real_catch_up(*words))
        return restored[-1]

    with monkeypatch.context() as patched:
        patched.setattr(keeping.Keeping, "keep", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            quantized(source, tmp_path / "q")
    monkeypatch.setattr("gptq_cli.engine.loop.catch_up", catch_up)
    assert same(quantized(source, tmp_path / "q"), expected)
    assert restored == [blocks]
