"""The operators in plain PyTorch: what the kernels must compute.

Every function here has the name, the arguments and the result of one operator of torch.ops.ternary.
Arithmetic is float32 (float64 where an input is), the result is rounded once to its dtype.

Shapes: b batch, l length, c channels, w conv width, d inner channels, h heads, p head dimension,
n state size, g B/C groups, q sequences. Activations are fp32, bf16 or fp16 and all of one dtype.
With `cu_seqlens` (int32 [q + 1], from 0 to l) the q sequences of a variable-length batch lie one after
another in a batch of one, and the states have q rows. States are float32 unless given in 16 bits.
"""

import math
import sys
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def quantize(weight: Tensor, group_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Absmean rounding of BitNet b1.58, a group at a time (arXiv 2402.17764, eq. 1-3; 2606.18114).

    weight [n, k] -> codes uint8 [n, k / 4], scales [n, k / group_size] with
    scale = mean |w| of the group, rounded to `scale_dtype`, and code = round(clip(w / scale, -1, 1)), ties to
    even. group_size k gives one scale a row, 0 one for the whole tensor ([1, 1]). The mean is taken in
    float64, so that it does not depend on the order of summation; a group of zeros has scale 0 and codes 0.
    """
    n, k = weight.shape
    rows, groups, size = (1, 1, n * k) if group_size == 0 else (n, k // group_size, group_size)
    w = weight.detach().float().reshape(rows, groups, size)
    scales = w.double().abs().mean(-1).to(scale_dtype)
    # |w| / s > 1/2 decides, not the quotient's rounding: 2 |w| > s is exact.
    ternary = torch.where(2 * w.abs() > scales.float().unsqueeze(-1), w.sign(), 0).to(torch.int8)
    return pack(ternary.reshape(n, k)), scales


def fake_quantize(latent: Tensor, group_size: int, scale_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """What a latent weight [n, k] in fp32 is once it has been packed: dequantize(quantize(latent)).

    The gradient goes straight through (arXiv 1308.3432): that of the latent weight is that of the result.
    """
    return dequantize(*quantize(latent, group_size, scale_dtype), dtype)


def pack(ternary: Tensor) -> Tensor:
    """int8 [n, k] in {-1, 0, +1} -> uint8 [n, k / 4]: weight i of a row at bits 2 (i mod 4) of byte i / 4,
    0 -> 00, +1 -> 01, -1 -> 11."""
    shifts = torch.arange(0, 8, 2, device=ternary.device)
    fields = (ternary.unflatten(-1, (-1, 4)).to(torch.int32) & 3) << shifts
    return fields.sum(-1).to(torch.uint8)


def unpack(codes: Tensor) -> Tensor:
    """uint8 [n, k / 4] -> int8 [n, k] in {-1, 0, +1}; the invalid code 10 becomes 0."""
    shifts = torch.arange(0, 8, 2, device=codes.device)
    fields = (codes.unsqueeze(-1).to(torch.int32) >> shifts & 3).flatten(-2)
    return (fields & 1).to(torch.int8) * (1 - (fields & 2)).to(torch.int8)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes uint8 [n, k / 4], scales [n, groups] or [1, 1] -> weight [n, k] = ternary * scale."""
    grouped = unpack(codes).unflatten(1, (scales.shape[1], -1)) * scales.float().unsqueeze(-1)
    return grouped.flatten(1).to(dtype)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., k] -> q e4m3 [..., k], scale [..., 1] = max |x| / 448 of a row; x ~ q * scale."""
    x = x.to(_accumulate(x))
    most = x.abs().amax(-1, keepdim=True)
    scale = (most / torch.full_like(most, 448)).clamp(min=2**-100)  # "/ 448" is "* (1 / 448)" on a GPU
    return (x * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def gemm(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, activations: str = "a16"
) -> Tensor:
    """y[..., n] = sum_k x[..., k] * weight[n, k] + bias[n], weight = dequantize(codes, scales).

    activations: "fp8" and "a8" first round a row of x to e4m3 with the scale max |x| / 448, or to int8 with
    the scale max |x| / 127.
    """
    acc = _accumulate(x)
    x_acc, x_scale = x.to(acc), 1
    if activations == "fp8":
        q, x_scale = quantize_fp8(x)
        x_acc = q.to(acc)
    elif activations == "a8":
        x_scale = (x_acc.abs().amax(-1, keepdim=True) / 127).clamp(min=2**-100)
        x_acc = (x_acc * (1 / x_scale)).clamp(-127, 127).round()
    y = F.linear(x_acc, dequantize(codes, scales, acc)) * x_scale
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


def int8_linear(x: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """x [..., k], table int8 [n, k], scale [n, 1] -> y[..., n] = scale[n] * sum_k x[..., k] * table[n, k]."""
    acc = _accumulate(x)
    return (F.linear(x.to(acc), table.to(acc)) * scale.squeeze(1).to(acc)).to(x.dtype)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time.

    x [b, l, c], weight [c, w], bias [c], initial_state [b or q, w - 1, c] (the inputs before x; zeros)
    -> y [b, l, c], final_state [b or q, w - 1, c] in initial_state's dtype or x's.
    """
    if cu_seqlens is not None:
        return _each_sequence(causal_conv1d, cu_seqlens, initial_state, (x,), weight, bias, silu=silu)
    acc, (b, l, c), width = _accumulate(x), x.shape, weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(b, width - 1, c)
    history = torch.cat([initial_state.to(acc), x.to(acc)], dim=1)  # [b, w - 1 + l, c]
    y = sum(history[:, i : i + l] * weight[:, i].to(acc) for i in range(width))
    if bias is not None:
        y = y + bias.to(acc)
    return (F.silu(y) if silu else y).to(x.dtype), history[:, l:].to(initial_state.dtype, copy=True)


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True
) -> Tensor:
    """One step: x [b, c], state [b, w - 1, c] (updated in place) -> y [b, c]."""
    y, final = causal_conv1d(x.unsqueeze(1), weight, bias, state, silu=silu)
    state.copy_(final)
    return y.squeeze(1)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1's scan (arXiv 2312.00752, algorithm 2), A and B discretised as in its section 2 and code.

    x, dt, z [b, l, d], A [d, n], B, C [b, l, n], D, dt_bias [d], initial_state [b or q, d, n]
    -> y [b, l, d], final_state [b or q, d, n]:
    h_t = exp(min(dt_t A, 0)) h_{t-1} + dt_t x_t B_t;  y_t = (h_t C_t + D x_t) silu(z_t).
    """
    if cu_seqlens is not None:
        return _each_sequence(
            lambda x, dt, B, C, z, initial_state: selective_scan(
                x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state
            ),
            cu_seqlens,
            initial_state,
            (x, dt, B, C, z),
        )
    acc, (b, l, d) = _accumulate(x), x.shape
    u, B, C, A = x.to(acc), B.to(acc), C.to(acc), A.to(acc)
    dt = _step_size(dt.to(acc), dt_bias, dt_softplus, 0.0, None)
    h = x.new_zeros(b, d, A.shape[1], dtype=acc) if initial_state is None else initial_state.to(acc)
    outputs = []
    for t in range(l):
        decay = torch.exp((dt[:, t, :, None] * A).clamp(max=0))
        h = decay * h + (dt[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    y = torch.stack(outputs, dim=1) if l else torch.zeros_like(u)
    return _skip_and_gate(y, u, D, z).to(x.dtype), h.to(_state_dtype(initial_state, acc))


def selective_scan_fused(
    x: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    dt_scales: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """selective_scan of the step sizes softplus(dt W^T + dt_bias), which are not rounded in between.

    dt [b, l, rank]; W is dt_weight [d, rank] of x's dtype, or codes dt_weight [d, rank / 4] with dt_scales.
    """
    acc = _accumulate(x)
    weight = dt_weight if dt_scales is None else dequantize(dt_weight, dt_scales, acc)
    dt = F.linear(dt.to(acc), weight.to(acc))
    return selective_scan(x, dt, A, B, C, D, z, dt_bias, True, initial_state, cu_seqlens)


def selective_scan_update(
    x: Tensor,
    state: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
) -> Tensor:
    """One step: x, dt, z [b, d], B, C [b, n], state [b, d, n] (updated in place) -> y [b, d]."""
    z = None if z is None else z.unsqueeze(1)
    x, dt, B, C = (v.unsqueeze(1) for v in (x, dt, B, C))
    y, final = selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, state)
    state.copy_(final)
    return y.squeeze(1)


CHUNK = 64  # tokens whose pairwise decays `ssd` holds at once; any value gives the same result


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's state-space duality in its chunked form (arXiv 2405.21060, section 6 and listing 1).

    x, z [b, l, h, p], dt [b, l, h], A, dt_bias [h], B, C [b, l, g, n], D [h] or [h, p],
    initial_state [b or q, h, p, n] -> y [b, l, h, p], final_state [b or q, h, p, n]:
    S_t = exp(min(dt_t A, 0)) S_{t-1} + dt_t x_t B_t^T;  y_t = (S_t C_t + D x_t) silu(z_t).
    """
    if cu_seqlens is not None:
        return _each_sequence(
            lambda x, dt, B, C, z, initial_state: ssd(
                x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state
            ),
            cu_seqlens,
            initial_state,
            (x, dt, B, C, z),
        )
    acc, (b, l, h, p), n = _accumulate(x), x.shape, B.shape[-1]
    u = x.to(acc)
    dt = _step_size(dt.to(acc), dt_bias, dt_softplus, dt_min, dt_max)
    state = x.new_zeros(b, h, p, n, dtype=acc) if initial_state is None else initial_state.to(acc)

    # Cut time into chunks of CHUNK tokens; a token of padding has dt = 0 and changes nothing.
    chunks, padding = -(-l // CHUNK), -l % CHUNK
    B, C = (v.to(acc).repeat_interleave(h // v.shape[2], dim=2) for v in (B, C))
    xdt, log_decay, B, C = (
        F.pad(v, [0, 0] * (v.dim() - 2) + [0, padding]).unflatten(1, (chunks, CHUNK))
        for v in (u * dt.unsqueeze(-1), (dt * A.to(acc)).clamp(max=0), B, C)
    )  # [b, chunks, CHUNK, ...]
    total = log_decay.cumsum(2)  # log of the decay from the chunk's start through each token

    # 1. Within a chunk: y = (L o C B^T) (dt x), L[i, j] = decay from token j to token i. Its logarithm is
    #    summed over j + 1 .. i; a difference of two entries of total would lose slow decays beside fast ones.
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
    strict, causal = causal.tril(-1)[:, :, None], causal[:, :, None]
    segments = log_decay.unsqueeze(3).masked_fill(~strict, 0).cumsum(2)  # [b, chunks, i, j, h]
    decay = torch.exp(segments.masked_fill(~causal, -math.inf))
    y = torch.einsum("bcihn,bcjhn,bcijh,bcjhp->bcihp", C, B, decay, xdt)
    # 2. What each chunk adds to the state at its end.
    added = torch.einsum("bcjhn,bcjh,bcjhp->bchpn", B, decay[:, :, -1], xdt)
    # 3. The states between chunks.
    starts = []
    for chunk in range(chunks):
        starts.append(state)
        state = torch.exp(total[:, chunk, -1])[..., None, None] * state + added[:, chunk]
    # 4. What the state at a chunk's start gives to each token.
    if chunks:
        y = y + torch.einsum("bcihn,bcih,bchpn->bcihp", C, torch.exp(total), torch.stack(starts, 1))
    if D is not None and D.dim() == 1:
        D = D.unsqueeze(-1)
    y = _skip_and_gate(y.flatten(1, 2)[:, :l], u, D, z)
    return y.to(x.dtype), state.to(_state_dtype(initial_state, acc))


def ssd_update(
    x: Tensor,
    state: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> Tensor:
    """One step of ssd: x, z [b, h, p], dt [b, h], B, C [b, g, n], state [b, h, p, n] (updated in place)
    -> y [b, h, p]."""
    z = None if z is None else z.unsqueeze(1)
    x, dt, B, C = (v.unsqueeze(1) for v in (x, dt, B, C))
    y, final = ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, state)
    state.copy_(final)
    return y.squeeze(1)


def rms_norm_gated(
    y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, norm_before_gate: bool
) -> Tensor:
    """RMSNorm of y * silu(z), or RMSNorm(y) * silu(z) if norm_before_gate, in `groups` parts of a row.

    y, z [rows, d] or [b, l, d], weight [d] -> like y.
    """
    acc = _accumulate(y)
    gate = F.silu(z.to(acc))
    h = y.to(acc) if norm_before_gate else y.to(acc) * gate
    parts = h.unflatten(-1, (groups, h.shape[-1] // groups))
    h = F.rms_norm(parts, parts.shape[-1:], eps=eps).flatten(-2) * weight.to(acc)
    return (h * gate if norm_before_gate else h).to(y.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x; returns RMSNorm(residual) in weight's dtype.

    x, residual (of any float dtype, updated in place) [rows, d] or [b, l, d], weight [d]. No gradient.
    """
    acc = _accumulate(residual)
    residual.copy_(residual.to(acc) + x.to(acc))
    return (F.rms_norm(residual.to(acc), residual.shape[-1:], eps=eps) * weight.to(acc)).to(weight.dtype)


def distillation(
    student: Tensor, teacher: Tensor, labels: Tensor, kl_weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logits student, teacher [rows, v], labels int64 [rows] -> KL [rows], CE [rows] in fp32.

    KL = KL(softmax(teacher / T) || softmax(student / T)); CE = -log softmax(student)[label]. `student`
    becomes d (kl_weight T^2 KL + (1 - kl_weight) CE) / d student.
    """
    acc, T, target = _accumulate(student), temperature, labels.unsqueeze(1)
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
    in_codes: Tensor,
    in_scales: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    ssm_state: Tensor,
    gate_norm: Tensor,
    out_codes: Tensor,
    out_scales: Tensor,
    workspace: Tensor,
    eps: float,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    activations: str = "a16",
    operators: Any = None,
) -> Tensor:
    """One token a sequence through every layer of a Mamba-2 model: the residual stream behind the last one.

    tokens int64 [b], embedding [v, d], or int8 with embedding_scale [v, 1]; then one slice a layer, L in all:
    norm [L, d], in_codes [L, 2 (h p + n) + h, d / 4] for z, x, B, C, dt, conv_weight [L, c, w], dt_bias, A, D
    [L, h], gate_norm [L, h p], out_codes [L, d, h p / 4], scales as in gemm; the states, updated in place,
    conv_state [L, b, w - 1, c], ssm_state [L, b, h, p, n] -> x float32 [b, d]. In each layer
    z, xBC, dt = gemm(RMSNorm(x), in);  y = ssd(silu(conv(xBC)), dt);  x <- x + gemm(RMSNorm(y silu(z)), out).
    Activations are rounded to norm's dtype; a kernel may keep them in float32. workspace is the kernel's own.
    activations: those of gemm. operators: where gemm, the updates and the gated norm come from, this module
    by default.
    """
    run, dtype, acc = operators or sys.modules[__name__], norm.dtype, _accumulate(norm)
    layers, b, h, p, n = ssm_state.shape
    x = embedding[tokens]
    if embedding_scale is not None:
        x = x.to(acc) * embedding_scale[tokens].to(acc)
    x = x.to(dtype).to(acc)
    for i in range(layers):
        u = F.rms_norm(x.to(dtype), x.shape[-1:], norm[i], eps)
        z, xBC, dt = run.gemm(u, in_codes[i], in_scales[i], None, activations).split(
            [h * p, h * p + 2 * n, h], dim=-1
        )
        bias = None if conv_bias is None else conv_bias[i]
        xBC = run.causal_conv1d_update(xBC, conv_state[i], conv_weight[i], bias)
        heads, B, C = xBC.split([h * p, n, n], dim=-1)
        heads, B, C = heads.reshape(b, h, p), B.unsqueeze(1), C.unsqueeze(1)
        options = (None, dt_bias[i], True, dt_min, dt_max)
        y = run.ssd_update(heads, ssm_state[i], dt, A[i], B, C, D[i], *options).reshape(b, h * p)
        y = run.rms_norm_gated(y, z, gate_norm[i], 1, eps, False)
        x = x + run.gemm(y, out_codes[i], out_scales[i], None, activations)
    return x


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


class ReferenceMode(TorchDispatchMode):
    """Inside `with ReferenceMode():` every torch.ops.ternary.* call runs the function of this module."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ternary":
            func = globals()[func.overloadpacket.__name__]
        return func(*args, **(kwargs or {}))


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _state_dtype(initial_state: Tensor | None, acc: torch.dtype) -> torch.dtype:
    return acc if initial_state is None else initial_state.dtype


def _step_size(dt: Tensor, bias: Tensor | None, softplus: bool, low: float, high: float | None) -> Tensor:
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    if softplus:
        dt = F.softplus(dt)
    return dt.clamp(low, high)


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + D.to(y.dtype) * x
    return y if z is None else y * F.silu(z.to(y.dtype))


def _each_sequence(scan, cu_seqlens, initial_state, inputs, *fixed, **options) -> tuple[Tensor, Tensor]:
    """Runs `scan` over each sequence of a packed batch of one."""
    bounds = cu_seqlens.tolist()
    results = []
    for i, (begin, end) in enumerate(pairwise(bounds)):
        pieces = [None if v is None else v[:, begin:end] for v in inputs]
        state = None if initial_state is None else initial_state[i : i + 1]
        results.append(scan(*pieces, *fixed, initial_state=state, **options))
    outputs, states = zip(*results, strict=True)
    return torch.cat(outputs, dim=1), torch.cat(states)
