"""The maths on a device: exact Hessians, the codes of a CPU, packed words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq import matmul
from gptq_cli.gptq.hessian import CrossMoment, Hessian
from gptq_cli.gptq.matmul import exact_bf16_product
from gptq_cli.gptq.packing import pack, unpack
from gptq_cli.gptq.solver import quantize_linears
from tests import reference
from tests.fakecuda import operators
from tests.fakecuda.devices import installed
from tests.gptq.cases import activations, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _asked_anew() -> None:
    exact_bf16_product.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("K", [7, 333, 1024])
def test_moments_are_exact(dtype: torch.dtype, K: int) -> None:
    """Error against float64 on the same rounded activations: fp32 summation only."""
    X, E = activations(900, K).to(dtype), activations(900, 40, seed=3).to(dtype)
    with Hessian(K, CUDA) as hessian, CrossMoment(K, CUDA, rows=40) as cross:
        for x, e in zip(X.split(400), E.split(400), strict=True):
            hessian.add(x.to(CUDA))
            cross.add(e.to(CUDA), x.to(CUDA))
        H, C = hessian.matrix().cpu(), cross.matrix().cpu()
    X, E = X.double(), E.double()
    for got, want in ((H, X.T @ X / 900), (C, E.T @ X / 900)):
        assert float((got - want).norm() / want.norm()) < 2e-6
    assert torch.equal(H, H.T)


def test_bf16_is_multiplied_as_it_is() -> None:
    assert exact_bf16_product(CUDA) in (matmul._add_in_place, matmul._add_after)
    assert matmul.product_into(torch.zeros(2, 2, device=CUDA), torch.bfloat16)[1] == torch.bfloat16
    assert matmul.product_into(torch.zeros(2, 2, device=CUDA), torch.float16)[1] == torch.float32
    assert matmul.product_into(torch.zeros(2, 2, dtype=torch.float64, device=CUDA), torch.bfloat16)[1] == (
        torch.float64
    )


@pytest.mark.skipif(installed() is None, reason="needs a device whose operators can be replaced")
def test_an_operator_that_rounds_or_raises_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    def rounds(A: torch.Tensor, B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (A @ B).to(dtype)

    monkeypatch.setattr(operators, "addmm_into", raises)
    assert exact_bf16_product(CUDA) is matmul._add_after
    exact_bf16_product.cache_clear()
    monkeypatch.setattr(operators, "mm_into", rounds)
    assert exact_bf16_product(CUDA) is None
    test_moments_are_exact(torch.bfloat16, 333)


@pytest.mark.parametrize("sym", [True, False])
def test_a_stage_is_solved_and_packed_where_it_is(sym: bool) -> None:
    """Whatever rounds in another order on the device, its codes lose no more than those of a CPU."""
    X = activations(400, 96, dtype=torch.float32)
    H, W = X.T @ X / 400, weights(64, 96, dtype=torch.float32)
    config = QuantizeConfig(group_size=32, sym=sym)
    (here,), (there,) = (quantize_linears([W.to(to)], H.to(to), config) for to in ("cpu", CUDA))
    assert there.codes.device == there.scales.device == CUDA
    assert float((here.codes != there.codes.cpu()).float().mean()) < 0.02
    assert there.loss == pytest.approx(here.loss, rel=0.02)
    packed = pack(there, 4, "gptq_v2")
    assert packed.qweight.device == CUDA
    codes, zeros = unpack(packed, 4, "gptq_v2", 96, 64)
    assert torch.equal(codes, there.codes)
    assert torch.equal(zeros, there.zeros)


@pytest.mark.parametrize("options", [{}, {"desc_act": True}, {"sym": False, "act_order": "none"}], ids=str)
def test_a_gpu_answers_like_the_cpu(options: dict[str, Any]) -> None:
    H, W = reference.hessian(activations(300, 96)), weights(40, 96)
    config = QuantizeConfig(group_size=32, **options)
    (cpu,) = quantize_linears([W], H, config)
    (gpu,) = quantize_linears([W.cuda()], H.cuda(), config)
    assert torch.equal(cpu.codes, gpu.codes.cpu())
    assert torch.equal(cpu.scales, gpu.scales.cpu())
    (fast,) = quantize_linears([W.cuda().bfloat16()], H.cuda().float(), config)
    assert fast.loss == pytest.approx(cpu.loss, rel=0.02)
