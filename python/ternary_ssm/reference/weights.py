"""Packed weights and the products with them, and int8 tables."""

import torch
import torch.nn.functional as F
from torch import Tensor


def quantize(weight: Tensor, group_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Absmean rounding of BitNet b1.58, a group at a time (arXiv 2402.17764, eq. 1-3; 2606.18114).

    weight [n, k] -> codes uint8 [n, k / 4], scales [n, k / group_size] with
    scale = mean |w| of the group, rounded to `scale_dtype`, and code = round(clip(w / scale, -1, 1)), ties to
    even. group_size k gives one scale a row, 0 one for the whole tensor ([1, 1]). The mean is taken in
    float64, so that the order of summation matters for ties alone; a group of zeros has scale 0 and codes 0.
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


def first_invalid(codes: Tensor) -> int:
    """The first weight, counted through the rows of codes, whose code is 10; -1 if there is none."""
    shifts = torch.arange(0, 8, 2, device=codes.device)
    found = ((codes.unsqueeze(-1).to(torch.int32) >> shifts & 3) == 2).flatten().nonzero()
    return int(found[0]) if len(found) else -1


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes uint8 [n, k / 4], scales [n, groups] or [1, 1] -> weight [n, k] = ternary * scale."""
    grouped = unpack(codes).unflatten(1, (scales.shape[1], -1)) * scales.float().unsqueeze(-1)
    return grouped.flatten(1).to(dtype)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., k] -> q e4m3 [..., k], scale [..., 1] = max |x| / 448 of a row; x ~ q * scale."""
    x = x.to(accumulate(x))
    most = x.abs().amax(-1, keepdim=True)
    scale = (most / torch.full_like(most, 448)).clamp(min=2**-100)  # "/ 448" is "* (1 / 448)" on a GPU
    return (x * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def gemm(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, activations: str = "a16"
) -> Tensor:
    """y[..., n] = sum_k x[..., k] * weight[n, k] + bias[n], weight = dequantize(codes, scales).

    activations: "fp8" and "a8" first round a row of x to e4m3 with the scale max |x| / 448, or to int8 with
    the scale max |x| / 127. "a16" multiplies x as it is; the operator on a CPU rounds it to 16 bits.
    """
    acc = accumulate(x)
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
    acc = accumulate(x)
    return (F.linear(x.to(acc), table.to(acc)) * scale.squeeze(1).to(acc)).to(x.dtype)


def accumulate(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
