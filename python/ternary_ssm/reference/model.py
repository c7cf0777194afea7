"""Norms, the loss of distillation, and a whole step of decoding."""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import accumulate


def rms_norm_gated(
    y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, norm_before_gate: bool
) -> Tensor:
    """RMSNorm of y * silu(z), or RMSNorm(y) * silu(z) if norm_before_gate, in `groups` parts of a row.

    y, z [rows, d] or [b, l, d], weight [d] -> like y.
    """
    acc = accumulate(y)
    gate = F.silu(z.to(acc))
    h = y.to(acc) if norm_before_gate else y.to(acc) * gate
    parts = h.unflatten(-1, (groups, h.shape[-1] // groups))
    h = F.rms_norm(parts, parts.shape[-1:], eps=eps).flatten(-2) * weight.to(acc)
    return (h * gate if norm_before_gate else h).to(y.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x; returns RMSNorm(residual) in weight's dtype.

    x, residual (of any float dtype, updated in place) [rows, d] or [b, l, d], weight [d]. No gradient.
    """
    acc = accumulate(residual)
    residual.copy_(residual.to(acc) + x.to(acc))
    return (F.rms_norm(residual.to(acc), residual.shape[-1:], eps=eps) * weight.to(acc)).to(weight.dtype)


def distillation(
    student: Tensor, teacher: Tensor, labels: Tensor, kl_weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logits student, teacher [rows, v], labels int64 [rows] -> KL [rows], CE [rows] in fp32.

    KL = KL(softmax(teacher / T) || softmax(student / T)); CE = -log softmax(student)[label]. `student`
    becomes d (kl_weight T^2 KL + (1 - kl_weight) CE) / d student.
    """
    acc, T, target = accumulate(student), temperature, labels.unsqueeze(1)
    logits, log_t = student.to(acc), (teacher.to(acc) / T).log_softmax(-1)
    log_s = logits.log_softmax(-1)
    soft_s = log_s if T == 1 else (logits / T).log_softmax(-1)
    p_t = log_t.exp()
    kl, ce = (p_t * (log_t - soft_s)).sum(-1), -log_s.gather(1, target).squeeze(1)
    # d / d logits = kl_weight T (soft_s - p_t) + (1 - kl_weight) (p_s - one-hot)
    grad = (soft_s.exp() - p_t).mul_(kl_weight * T).add_(log_s.exp(), alpha=1 - kl_weight)
    student.copy_(grad.scatter_add_(1, target, torch.full_like(target, kl_weight - 1, dtype=acc)))
    return kl, ce


def decode(
    tokens: Tensor,
    embedding: Tensor,
    embedding_scale: Tensor | None,
    norm: Tensor,
    in_codes: list[Tensor],
    in_scales: list[Tensor],
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    ssm_state: Tensor,
    gate_norm: Tensor,
    out_codes: list[Tensor],
    out_scales: list[Tensor],
    workspace: Tensor,
    eps: float,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    activations: str = "a16",
    operators: Any = None,
) -> Tensor:
    """One token a sequence through every layer of a Mamba-2 model: the residual stream behind the last one.

    tokens int64 [b], embedding [v, d], or int8 with embedding_scale [v, 1]; then one slice a layer, L in all:
    norm [L, d], in_codes L x [2 (h p + n) + h, d / 4] for z, x, B, C, dt, conv_weight [L, c, w], dt_bias,
    A, D [L, h], gate_norm [L, h p], out_codes L x [d, h p / 4], scales as in gemm (these lists, on a GPU,
    slices of one tensor each); the states, updated in place, conv_state [L, b, w - 1, c], ssm_state
    [L, b, h, p, n] -> x float32 [b, d]. In each layer
    z, xBC, dt = gemm(RMSNorm(x), in);  y = ssd(silu(conv(xBC)), dt);  x <- x + gemm(RMSNorm(y silu(z)), out).
    Activations are rounded to norm's dtype; a kernel may keep them in float32. workspace is the kernel's own.
    activations: those of gemm. operators: where gemm, the updates and the gated norm come from, this module
    by default.
    """
    run = operators or sys.modules[__package__]
    b, h, p, n = ssm_state.shape[1:]

    def mix(i: int, xBC: Tensor, dt: Tensor) -> Tensor:
        bias = None if conv_bias is None else conv_bias[i]
        xBC = run.causal_conv1d_update(xBC, conv_state[i], conv_weight[i], bias)
        x, B, C = xBC.split([h * p, n, n], dim=-1)
        x, B, C = x.reshape(b, h, p), B.unsqueeze(1), C.unsqueeze(1)
        options = (D[i], None, dt_bias[i], True, dt_min, dt_max)
        return run.ssd_update(x, ssm_state[i], dt, A[i], B, C, *options)

    weights = (norm, in_codes, in_scales, gate_norm, out_codes, out_scales)
    x = _embed(tokens, embedding, embedding_scale, norm.dtype)
    return _layers(run, x, *weights, h * p, n, mix, eps, activations)


def prefill(
    tokens: Tensor,
    cu_seqlens: Tensor | None,
    embedding: Tensor,
    embedding_scale: Tensor | None,
    norm: Tensor,
    in_codes: list[Tensor],
    in_scales: list[Tensor],
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    ssm_state: Tensor,
    gate_norm: Tensor,
    out_codes: list[Tensor],
    out_scales: list[Tensor],
    eps: float,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    activations: str = "a16",
    operators: Any = None,
) -> Tensor:
    """Whole sequences, from their beginning, through every layer of a Mamba-2 model.

    tokens int64 [b, l], or [1, l] for the q sequences end to end of cu_seqlens int32 [q + 1]; the rest as in
    decode. Only writes the states, [L, b or q, ...]: those behind each sequence -> x float32 [b, l, d].
    """
    run = operators or sys.modules[__package__]
    h, p, n = ssm_state.shape[2:]

    def mix(i: int, xBC: Tensor, dt: Tensor) -> Tensor:
        bias = None if conv_bias is None else conv_bias[i]
        xBC, final = run.causal_conv1d(xBC, conv_weight[i], bias, None, cu_seqlens)
        conv_state[i] = final
        x, B, C = xBC.split([h * p, n, n], dim=-1)
        x, B, C = x.unflatten(-1, (h, p)), B.unsqueeze(2), C.unsqueeze(2)
        options = (D[i], None, dt_bias[i], True, dt_min, dt_max)
        y, final = run.ssd(x, dt, A[i], B, C, *options, None, cu_seqlens)
        ssm_state[i] = final
        return y

    weights = (norm, in_codes, in_scales, gate_norm, out_codes, out_scales)
    x = _embed(tokens, embedding, embedding_scale, norm.dtype)
    return _layers(run, x, *weights, h * p, n, mix, eps, activations)


def _embed(tokens: Tensor, embedding: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    x, acc = embedding[tokens], torch.promote_types(dtype, torch.float32)
    if scale is not None:
        x = x.to(acc) * scale[tokens].to(acc)
    return x.to(dtype).to(acc)


def _layers(
    run: Any,
    x: Tensor,
    norm: Tensor,
    in_codes: list[Tensor],
    in_scales: list[Tensor],
    gate_norm: Tensor,
    out_codes: list[Tensor],
    out_scales: list[Tensor],
    d_inner: int,
    state_size: int,
    mix: Callable[[int, Tensor, Tensor], Tensor],
    eps: float,
    activations: str,
) -> Tensor:
    """x [..., d] behind the layers; mix(i, xBC, dt) is what layer i does between its projections."""
    sizes = [d_inner, d_inner + 2 * state_size]
    for i in range(len(norm)):
        u = F.rms_norm(x.to(norm.dtype), x.shape[-1:], norm[i], eps)
        projected = run.gemm(u, in_codes[i], in_scales[i], None, activations)
        z, xBC, dt = projected.split([*sizes, projected.shape[-1] - sum(sizes)], dim=-1)
        y = run.rms_norm_gated(mix(i, xBC, dt).flatten(-2), z, gate_norm[i], 1, eps, False)
        x = x + run.gemm(y, out_codes[i], out_scales[i], None, activations)
    return x


def head(
    hidden: Tensor, norm: Tensor, table: Tensor, scale: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The last norm and the head: hidden [..., d], the residual stream in fp32 -> logits [..., v].

    norm [d]. table [v, d] in norm's dtype, or int8 with scale [v, 1]. What the norm gives is rounded to
    norm's dtype before the product; the kernel rounds it to integers of 16 bits for an int8 table.
    """
    acc = accumulate(hidden)
    x = hidden.to(acc)
    u = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.to(acc)
    logits = F.linear(u.to(norm.dtype).to(acc), table.to(acc))
    return (logits if scale is None else logits * scale.squeeze(1).to(acc)).to(norm.dtype)


def choose(logits: Tensor, vocab_size: int, tokens: Tensor, chosen: Tensor, step: Tensor) -> None:
    """The greedy choice of a step of decoding, written where the next step and the host find it.

    logits [b, v], the first vocab_size count -> tokens int64 [b]: the first of the largest, any where a logit
    is NaN. chosen int64 [slots, b]: its row step[0] % slots gets the same, -1 where a logit is not finite.
    step int64 [2]: step[0] counts up; step[1] is the kernel's own, 0 between calls.
    """
    scores = logits[:, :vocab_size].float()
    places = torch.arange(vocab_size, device=logits.device)
    first = torch.where(scores == scores.amax(-1, keepdim=True), places, vocab_size - 1).amin(-1)
    tokens.copy_(first)
    chosen[step[:1] % len(chosen)] = torch.where(scores.isfinite().all(-1), first, -1)
    step[:1] += 1
