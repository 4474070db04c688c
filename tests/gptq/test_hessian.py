"""Moments: exact matmuls, sums that do not depend on the batches, the process-wide precision unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_cli.gptq import hessian as hessian_module
from gptq_cli.gptq import matmul as precision
from gptq_cli.gptq.hessian import CrossMoment, Hessian, shrink
from gptq_cli.gptq.matmul import exact_matmul, fast_matmul
from tests import reference
from tests.gptq.cases import activations

MKLDNN: Any = torch.backends.mkldnn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("K", [7, 64, 333])
def test_matmuls_are_exact_and_sums_are_fp32(dtype: torch.dtype, K: int) -> None:
    """Error against float64 on the same rounded activations: fp32 summation only, whatever the units."""
    X = activations(900, K).to(dtype)
    with Hessian(K) as hessian:
        hessian.add(X)
        H = hessian.matrix()
    exact = X.double().T @ X.double() / 900
    assert float((H - exact).norm() / exact.norm()) < 2e-6
    assert torch.equal(H, H.T)


def test_small_case_equals_the_textbook() -> None:
    X = activations(50, 9)
    with Hessian(9, dtype=torch.float64) as hessian:
        hessian.add(X)
        torch.testing.assert_close(hessian.matrix(), reference.hessian(X), rtol=1e-12, atol=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 50))
def test_independent_of_the_batch_split(cuts: list[int], K: int) -> None:
    X = activations(sum(cuts) + 1, K)
    whole, parts = Hessian(K, dtype=torch.float64), Hessian(K, dtype=torch.float64)
    whole.add(X)
    for part in X.split([*cuts, 1]):
        parts.add(part)
    assert whole.tokens == parts.tokens == sum(cuts) + 1
    torch.testing.assert_close(whole.matrix(), parts.matrix(), rtol=1e-11, atol=1e-13)


def test_batches_of_sequences_are_tokens() -> None:
    X = activations(60, 16, dtype=torch.float32)
    flat, batched = Hessian(16), Hessian(16)
    flat.add(X)
    batched.add(X.view(3, 20, 16))
    assert batched.tokens == 60
    torch.testing.assert_close(flat.matrix(), batched.matrix())


def test_tokens_beyond_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_cli.gptq.hessian._CHUNK_VALUES", 64)
    X, Y = activations(50, 16), activations(50, 16, seed=4)
    H, C = Hessian(16, dtype=torch.float64), CrossMoment(16, dtype=torch.float64)
    H.add(X)
    C.add(X, Y)
    torch.testing.assert_close(H.matrix(), X.T @ X / 50)
    torch.testing.assert_close(C.matrix(), X.T @ Y / 50)


def test_the_life_of_a_hessian() -> None:
    with Hessian(4) as hessian:
        assert torch.equal(hessian.matrix(), torch.zeros(4, 4))
        assert hessian.matrix() is hessian.matrix()
        with pytest.raises(RuntimeError, match="finished"):
            hessian.add(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="freed"):
        hessian.matrix()
    with Hessian(4) as hessian, pytest.raises(ValueError, match="5 features"):
        hessian.add(torch.ones(1, 5))


@pytest.mark.parametrize("batch", [64, 700])
def test_bf16_streams_are_summed_within_a_stated_bound(batch: int, fast: str) -> None:
    """With units each chunk's product is cut to bf16, 2⁻⁹ of its size (more than once where units are only
    emulated); without, nothing is cut."""
    error, x = activations(2100, 16).bfloat16(), activations(2100, 16).roll(3, 1).bfloat16()
    with CrossMoment(16) as cross:
        for e, q in zip(torch.split(error, batch), torch.split(x, batch), strict=True):
            cross.add(e, q)
        C = cross.matrix().double()
    exact = error.double().T @ x.double() / 2100
    size = error.double().abs().T @ x.double().abs() / 2100
    assert bool(((C - exact).abs() <= (2**-7 if fast == "bf16" else 1e-6) * size).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_value_shows_on_the_diagonal(bad: float) -> None:
    hessian, X = Hessian(8), torch.ones(5, 8)
    hessian.add(X)
    assert hessian.finite()
    X[2, 3] = bad
    hessian.add(X)
    assert not hessian.finite()


@pytest.fixture(params=[True, False], ids=["units", "no-units"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The precision of fast matmuls, on a CPU with and without fast bf16."""
    for module in (precision, hessian_module):
        monkeypatch.setattr(module, "fast_matmul_supported", lambda dtype, device_type: request.param)
    return "bf16" if request.param else "ieee"


def test_precision_is_scoped_and_restored(fast: str) -> None:
    def state() -> tuple[str, str]:
        return MKLDNN.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision

    before = state()
    with fast_matmul():
        assert state() == (fast, "tf32")
        with exact_matmul():
            assert state() == ("ieee", "ieee")
        assert state() == (fast, "tf32")
    assert state() == before
    with pytest.raises(KeyError), fast_matmul():
        raise KeyError
    assert state() == before


def test_precision_survives_an_exception_inside_add(fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = MKLDNN.matmul.fp32_precision
    MKLDNN.matmul.fp32_precision = other = "ieee" if fast == "bf16" else "bf16"

    def fails(*_: object, **__: object) -> None:
        assert MKLDNN.matmul.fp32_precision == fast
        raise KeyError

    monkeypatch.setattr(torch.Tensor, "addmm_", fails)
    try:
        with pytest.raises(KeyError):
            Hessian(4).add(torch.ones(3, 4, dtype=torch.bfloat16))
        assert MKLDNN.matmul.fp32_precision == other
    finally:
        MKLDNN.matmul.fp32_precision = before


def test_activations_are_multiplied_with_the_bits_they_have(
    fast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 and fp16 activations must not meet the bf16 units of a CPU, even if the process allowed them."""
    seen: list[str] = []
    plain = torch.Tensor.addmm_

    def spy(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(MKLDNN.matmul.fp32_precision)
        return plain(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "addmm_", spy)
    before = MKLDNN.matmul.fp32_precision
    MKLDNN.matmul.fp32_precision = "bf16"
    try:
        for dtype, wanted in ((torch.bfloat16, fast), (torch.float16, "ieee"), (torch.float32, "ieee")):
            seen.clear()
            Hessian(16).add(torch.ones(3, 16, dtype=dtype))
            CrossMoment(16).add(torch.ones(3, 16, dtype=dtype), torch.ones(3, 16, dtype=dtype))
            assert set(seen) == {wanted}, dtype
        seen.clear()
        CrossMoment(16).add(torch.ones(3, 16, dtype=torch.bfloat16), torch.ones(3, 16))
        assert seen == ["ieee"]
        assert MKLDNN.matmul.fp32_precision == "bf16"
    finally:
        MKLDNN.matmul.fp32_precision = before


def test_the_cross_moment_refuses_streams_of_different_length() -> None:
    with pytest.raises(ValueError, match="3 tokens, the input 2"):
        CrossMoment(4).add(torch.ones(3, 4), torch.ones(2, 4))


def test_the_cross_moment_of_outputs_is_not_square() -> None:
    E, X = activations(50, 6), activations(50, 16, seed=4)
    C = CrossMoment(16, dtype=torch.float64, rows=6)
    C.add(E.view(5, 10, 6), X.view(5, 10, 16))
    torch.testing.assert_close(C.matrix(), E.T @ X / 50)


def test_shrinking_weighs_by_tokens() -> None:
    H, pool = reference.hessian(activations(10, 6)), reference.hessian(activations(500, 6, seed=2))
    torch.testing.assert_close(shrink(H, 10, pool), (10 * H + 6 * pool) / 16)
    torch.testing.assert_close(shrink(H, 0, pool), pool)


@pytest.mark.parametrize("K", [7, 333])
def test_bf16_that_is_not_widened_gives_the_same_sums(K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: the factors stay bf16, products and sums are fp32; emulated with fp32 factors."""
    seen: set[torch.dtype] = set()

    def added(C: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
        seen.update((A.dtype, B.dtype))
        C += A.float() @ B.float()

    monkeypatch.setattr(hessian_module, "product_into", lambda C, dtype: (added, dtype))
    X = activations(900, K).bfloat16()
    with Hessian(K) as hessian:
        for x in X.split(500):
            hessian.add(x)
        H = hessian.matrix()
    exact = X.double().T @ X.double() / 900
    assert seen == {torch.bfloat16}
    assert float((H - exact).norm() / exact.norm()) < 2e-6


def test_a_cpu_widens() -> None:
    assert precision.exact_bf16_product(torch.device("cpu")) is None
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert precision.product_into(torch.zeros(2, 2), dtype) == (torch.Tensor.addmm_, torch.float32)
