"""The convolution over time and the recurrences of both generations of Mamba."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import accumulate, dequantize


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
    acc, (b, l, c), width = accumulate(x), x.shape, weight.shape[1]
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
    acc, (b, l, d) = accumulate(x), x.shape
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
    acc = accumulate(x)
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
    acc, (b, l, h, p), n = accumulate(x), x.shape, B.shape[-1]
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
