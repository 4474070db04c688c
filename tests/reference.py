"""The reference implementation for `gptq_cli.gptq`: textbook, float64, one weight at a time. Codes and scales
of the package must equal its results.

Where the package factorises, gathers feedback, stacks, transposes and batches, this file does what the papers
say: Optimal Brain Quantization with an explicit inverse that is eliminated column by column; a search that
tries one candidate after another for one group of one row; coordinate descent that recomputes every slope
from the definition. W is (N, K) here, as in the papers. Only the rules that define the result are shared: a
scale is rounded to fp16 before it is used, the first of equal candidates wins, and `QuantizeConfig` itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_cli.config import QuantizeConfig


@dataclass(frozen=True)
class Reference:
    """The result that the solver must give, all tensors in the orientation of `QuantizedLinear`."""

    codes: Tensor  # (N, K) float64
    scales: Tensor  # (N, G) float64
    zeros: Tensor  # (N, G) float64
    g_idx: Tensor  # (K,) int64
    loss: float

    def dequantize(self) -> Tensor:
        return (self.codes - self.zeros[:, self.g_idx]) * self.scales[:, self.g_idx]


def hessian(X: Tensor) -> Tensor:  # X (tokens, K)
    """The mean of x xᵀ, one token at a time."""
    H = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    for x in X.double():
        H += torch.outer(x, x)
    return H / X.shape[0]


def relative_loss(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ)."""
    W, Q, H = W.double(), Q.double(), H.double()
    E = W - Q
    return float(torch.trace(E @ H @ E.T) / torch.trace(W @ H @ W.T))


def fp16(scale: float) -> float:
    if scale == 0:
        return 1.0
    rounded = float(torch.tensor(max(-65504.0, min(65504.0, scale)), dtype=torch.float64).half().double())
    return rounded if rounded else (2.0**-24 if scale > 0 else -(2.0**-24))


def clamp(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def level(w: float, scale: float, zero: float, bits: int) -> float:
    """The nearest level: Python rounds halves to even, as torch does."""
    return clamp(float(round(w / scale)), -zero, 2**bits - 1 - zero)


# --- scales ------------------------------------------------------------------------------------------------


def find(w: list[float], energy: list[float], config: QuantizeConfig) -> tuple[float, float]:
    """Scale and zero of one group of one row."""
    if config.scale_search == "minmax":
        return covering(w, config)
    if config.scale_search == "mse":
        tried = [shrunken(w, 1 - i / 100, config) for i in range(80)]
        return best_of(tried, w, [1.0] * len(w), 2.4, config.bits)
    weight = [max(h, 0.0) ** 0.5 for h in energy]
    mean = sum(weight) / len(weight)
    weight = [c / mean for c in weight] if mean > 0 else [1.0] * len(w)
    return search_sym(w, weight, config) if config.sym else search_asym(w, weight, config)


def covering(w: list[float], config: QuantizeConfig) -> tuple[float, float]:
    return shrunken(w, 1.0, config)


def shrunken(w: list[float], clip: float, config: QuantizeConfig) -> tuple[float, float]:
    """The original code's range, both ends times `clip`."""
    top = 2**config.bits - 1
    low, high = min([*w, 0.0]), max([*w, 0.0])
    if config.sym:
        return fp16(max(high, -low) * 2 * clip / top), 2.0 ** (config.bits - 1)
    scale = fp16((high - low) * clip / top)
    return scale, clamp(float(round(-(low * clip) / scale)), 0, top)


def error(w: list[float], weight: list[float], power: float, scale: float, zero: float, bits: int) -> float:
    return sum(
        c * abs(x - level(x, scale, zero, bits) * scale) ** power for x, c in zip(w, weight, strict=True)
    )


def best_of(
    tried: list[tuple[float, float]], w: list[float], weight: list[float], power: float, bits: int
) -> tuple[float, float]:
    return min(tried, key=lambda pair: error(w, weight, power, *pair, bits))


def search_sym(w: list[float], weight: list[float], config: QuantizeConfig) -> tuple[float, float]:
    bits, half = config.bits, 2.0 ** (config.bits - 1)
    reach = max(max(w), -min(w)) / half
    sign = 1.0 if -min(w) >= max(w) else -1.0
    clips = [1.0, 0.93, 0.86, 0.79, 0.72, 0.65] if bits >= 4 else [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    steps = (0.035, 0.0175) if bits >= 4 else (0.05, 0.025)
    signs = [sign, -sign] if bits <= 3 else [sign]
    if config.positive_scales:
        clips, signs = [half / (half - 1), *clips], [1.0]
    tried = [clip * side for clip in clips for side in signs]

    def loss_of(clip: float) -> float:
        return error(w, weight, 2.5, fp16(reach * clip), half, bits)

    best = min(tried, key=loss_of)
    for step in steps:
        best = min([best, best * (1 + step), best * (1 - step)], key=loss_of)
    return fp16(reach * best), half


def search_asym(w: list[float], weight: list[float], config: QuantizeConfig) -> tuple[float, float]:
    bits, top = config.bits, 2**config.bits - 1
    low, high = min([*w, 0.0]), max([*w, 0.0])

    def parameters(ends: tuple[float, float]) -> tuple[float, float]:
        scale = fp16((high * ends[1] - low * ends[0]) / top)
        return scale, clamp(float(round(-(low * ends[0]) / scale)), 0, top)

    def loss_of(ends: tuple[float, float]) -> float:
        return error(w, weight, 2.5, *parameters(ends), bits)

    narrow = 0.6 if bits >= 3 else 0.5
    best = min([(1 - i * (1 - narrow) / 5,) * 2 for i in range(6)], key=loss_of)
    for step in (0.12, 0.06, 0.03):
        for end in (0, 1):
            for factor in (1 + step, 1 - step):
                # each candidate starts from the best so far
                moved = (best[0] * factor, best[1]) if end == 0 else (best[0], best[1] * factor)
                best = min([best, moved], key=loss_of)
    return parameters(best)


# --- the solve ---------------------------------------------------------------------------------------------


def quantize(W: Tensor, H: Tensor, config: QuantizeConfig) -> Reference:
    """GPTQ as Optimal Brain Quantization: every option, no tricks."""
    W, H = W.double().clone(), H.double()
    N, K = W.shape
    original = W.clone()
    dead = H.diagonal() == 0
    mean = float(H.diagonal()[~dead].mean())
    damped = H + config.damp_percent * mean * torch.eye(K, dtype=torch.float64)
    damped[dead, dead] = mean
    W[:, dead] = 0
    target = W.clone()

    ordered = config.desc_act or config.act_order == "static"
    order = sorted(range(K), key=lambda k: -float(H[k, k])) if ordered else list(range(K))
    static = config.act_order == "static" and not config.desc_act
    size = K if config.group_size == -1 else min(config.group_size, K)
    columns = list(range(K)) if static else order
    groups = [columns[a : a + size] for a in range(0, K, size)]
    group_of = {k: i for i, group in enumerate(groups) for k in group}

    scales = torch.zeros(N, len(groups), dtype=torch.float64)
    zeros = torch.zeros(N, len(groups), dtype=torch.float64)

    def fill(i: int) -> None:
        energy = H.diagonal()[groups[i]].tolist()
        for n in range(N):
            scales[n, i], zeros[n, i] = find(W[n, groups[i]].tolist(), energy, config)

    if static:
        for i in range(len(groups)):
            fill(i)
    inverse = torch.linalg.inv(damped)
    codes = torch.zeros(N, K, dtype=torch.float64)
    for k in order:
        i = group_of[k]
        if not static and k == groups[i][0]:
            fill(i)
        for n in range(N):
            s, z = float(scales[n, i]), float(zeros[n, i])
            nearest = level(float(W[n, k]), s, z, config.bits)
            codes[n, k] = nearest + z
            e = (float(W[n, k]) - nearest * s) / float(inverse[k, k])
            W[n] -= e * inverse[k]  # rows of the inverse are 0 where a column is gone
            W[n, k] = nearest * s
        inverse -= torch.outer(inverse[:, k], inverse[k]) / inverse[k, k].clone()
        inverse[k, :] = inverse[:, k] = 0

    goal = H + config.damp_percent * mean * torch.eye(K, dtype=torch.float64)
    refined = [refine(target[n], codes[n], scales[n], zeros[n], goal, groups, config) for n in range(N)]
    codes = torch.stack([row[0] for row in refined])
    scales = torch.stack([row[1] for row in refined])
    g_idx = torch.tensor([group_of[k] for k in range(K)])
    Q = (codes - zeros[:, g_idx]) * scales[:, g_idx]
    return Reference(codes, scales, zeros, g_idx, relative_loss(original, Q, H))


def refine(
    w: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    H: Tensor,
    groups: list[list[int]],
    config: QuantizeConfig,
) -> tuple[Tensor, Tensor]:
    """Refit and sweep one row; the slope is computed from its definition before every move."""
    K = w.shape[0]
    group_of = [next(i for i, group in enumerate(groups) if k in group) for k in range(K)]

    def value(codes: Tensor, scales: Tensor) -> Tensor:
        return torch.stack([(codes[k] - zeros[group_of[k]]) * scales[group_of[k]] for k in range(K)])

    def loss(codes: Tensor, scales: Tensor) -> float:
        d = w - value(codes, scales)
        return float(d @ H @ d)

    new_codes, new_scales = codes.clone(), scales.clone()
    for turn in range(max(config.sweeps, int(config.refit))):
        for i, group in enumerate(groups):
            if config.refit:
                direction = torch.zeros(K, dtype=torch.float64)
                direction[group] = new_codes[group] - zeros[i]
                slope = float(direction @ H @ (w - value(new_codes, new_scales)))
                curve = float(direction @ H @ direction)
                lowest = float(new_scales[i]) + slope / (curve if curve > 0 else 1.0)
                moved = new_scales.clone()
                moved[i] = torch.tensor(clamp(lowest, -65504.0, 65504.0), dtype=torch.float64).half().double()
                if (
                    loss(new_codes, moved) < loss(new_codes, new_scales)
                    and float(moved[i] * new_scales[i]) > 0
                ):
                    new_scales = moved
            if turn < config.sweeps:
                for k in group:
                    s, z = float(new_scales[i]), float(zeros[i])
                    q = (float(new_codes[k]) - z) * s
                    best = q + float(H[k] @ (w - value(new_codes, new_scales))) / float(H[k, k])
                    new_codes[k] = level(best, s, z, config.bits) + z
    if loss(new_codes, new_scales) < loss(codes, scales):
        return new_codes, new_scales
    return codes, scales


def gptq_original(
    W: Tensor, H: Tensor, bits: int, group_size: int, damp_percent: float, block: int = 128
) -> Tensor:  # Q (N, K)
    """The loop that most programs run, in any dtype: symmetric min/max scales, columns in their own order.

    Cholesky, inverse, Cholesky; one outer product per column within a block; every later column rewritten
    after it. As the original code, except that a group's scale is read from its current columns. `block` must
    be a multiple of `group_size`. The benchmark compares the solver with it.
    """
    W, K = W.clone(), W.shape[1]
    damped = H + damp_percent * H.diagonal().mean() * torch.eye(K, dtype=H.dtype)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    Q, half = torch.zeros_like(W), 2 ** (bits - 1)
    scale = W.new_ones(W.shape[0])
    for i1 in range(0, K, block):
        i2 = min(i1 + block, K)
        B, E, Ub = W[:, i1:i2].clone(), torch.zeros_like(W[:, i1:i2]), U[i1:i2, i1:i2]
        for j in range(i2 - i1):
            if (i1 + j) % group_size == 0:
                scale = (B[:, j : j + group_size].abs().amax(1) * 2 / (2**bits - 1)).half().to(W.dtype)
            q = torch.clamp(torch.round(B[:, j] / scale), -half, half - 1) * scale
            E[:, j] = (B[:, j] - q) / Ub[j, j]
            B[:, j:] -= E[:, j].unsqueeze(1).matmul(Ub[j, j:].unsqueeze(0))
            Q[:, i1 + j] = q
        W[:, i2:] -= E @ U[i1:i2, i2:]
    return Q


def goal_behind_a_norm(
    W: Tensor,  # (N, K)
    gamma: Tensor,  # (N,)
    eps: float,
    x: Tensor,  # (tokens, K)
    dense: Tensor,  # (tokens, K)
    gap: Tensor,  # (tokens, N) residual of the dense stream, less that of x
) -> Tensor:  # (N, K)
    """The Q that minimises Σ ‖gap + norm(W dense) - γ ⊙ Q x / rms(W x)‖², row after row."""
    rms, dense_rms = ((t @ W.T).square().mean(1, keepdim=True).add(eps).sqrt() for t in (x, dense))
    rows = []
    for n in range(W.shape[0]):
        wanted = gap[:, n : n + 1] + gamma[n] * (dense @ W[n])[:, None] / dense_rms
        rows.append(torch.linalg.lstsq(gamma[n] * x / rms, wanted).solution[:, 0])
    return torch.stack(rows)
