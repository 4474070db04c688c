import pytest
import torch

from gptq_cli.config import QuantizeConfig
from gptq_cli.engine.wire import Shape, from_bytes, joined, to_bytes, wire_bytes
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.gptq.solver import quantize_linears

K = 64


def solved(rows: int, seed: int = 0) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, K, generator=generator)
    weight = torch.randn(rows, K, generator=generator)
    (found,) = quantize_linears([weight], x.T @ x / 400, QuantizeConfig(group_size=32, sym=False))
    return found


def same(a: QuantizedLinear, b: QuantizedLinear) -> bool:
    tensors = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("codes", "scales", "zeros", "g_idx"))
    account = ("loss", "rtn_loss", "energy", "damp_percent", "attempts", "method")
    return tensors and all(getattr(a, name) == getattr(b, name) for name in account)


@pytest.mark.parametrize("rows", [[], [3], [17, 32, 5]])
def test_what_is_sent_arrives(rows: list[int]) -> None:
    linears = [solved(count, seed) for seed, count in enumerate(rows)]
    shapes = [Shape(count, K, 2) for count in rows]
    flat = to_bytes(linears, torch.device("cpu"))
    assert flat.numel() == wire_bytes(shapes)
    arrived = from_bytes(flat.clone(), shapes)
    assert len(arrived) == len(linears)
    assert all(same(a, b) for a, b in zip(linears, arrived, strict=True))


def test_a_linear_in_pieces_is_the_linear() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, K, generator=generator)
    weight, H = torch.randn(48, K, generator=generator), x.T @ x / 400
    config = QuantizeConfig(group_size=32)
    (whole,) = quantize_linears([weight], H, config)
    pieces = [quantize_linears([part], H, config)[0] for part in (weight[:16], weight[16:])]
    found = joined(pieces)
    assert torch.equal(found.codes, whole.codes)
    assert torch.equal(found.scales, whole.scales)
    assert found.loss == pytest.approx(whole.loss, rel=1e-5)
    assert found.rtn_loss == pytest.approx(whole.rtn_loss, rel=1e-5)
    assert found.energy == pytest.approx(whole.energy, rel=1e-5)


def test_pieces_of_nothing_lose_what_the_worst_of_them_loses() -> None:
    from dataclasses import replace

    piece = replace(solved(2), energy=0.0, loss=0.0)
    assert joined([piece, replace(piece, loss=float("inf"))]).loss == float("inf")
