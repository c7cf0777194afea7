"""From weights to codes and scales: the packed pair, and the fake quantization that training sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import TernaryConfig


@dataclass(frozen=True)
class TernaryWeight:
    """A packed weight: codes uint8 [n, k / 4] (docs/format.md), scales [n, groups] or [1, 1]."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def from_float(cls, weight: Tensor, config: TernaryConfig, scales: Tensor | None = None) -> TernaryWeight:
        """Rounds weight [n, k] by the config's rule, scales to its scale_dtype.

        scales: those of a rule that trains them, before rounding. ValueError if the group size does not
        divide k; RuntimeError on the CPU where a scale is not finite, which a GPU could not tell without
        making the host wait: there the scale stays so.
        """
        group, dtype = config.group_of(weight.shape[1]), config.torch_scale_dtype
        if config.rule == "absmean":
            return cls(*torch.ops.ternary.quantize(weight.detach().contiguous(), group, dtype))
        w = _grouped(weight, group)
        magnitude = w.abs()
        if config.trains_scales:
            if scales is None:
                raise ValueError(f"rule {config.rule!r} trains its scales, expected them beside the weight")
            scales = _round_scales(scales.detach().clamp(min=0), w, dtype)
            kept = 2 * magnitude > scales.float().unsqueeze(-1)  # round(clip(w / scale, -1, 1)) is not 0
        else:
            kept = _KEEP[config.rule](magnitude)
            mean = (magnitude * kept).sum(-1, dtype=torch.float64) / kept.sum(-1).clamp(min=1)
            scales = _round_scales(mean, w, dtype)
        ternary = torch.where(kept, w.sign(), 0).to(torch.int8)
        return cls(torch.ops.ternary.pack(ternary.reshape(weight.shape)), scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[n, k] = code * scale."""
        return torch.ops.ternary.dequantize(self.codes, self.scales, dtype)

    def zero_ratio(self) -> float:
        """Share of codes that are 0: 0.31 for a Gaussian weight under absmean, towards 0.9 in a collapse."""
        return (torch.ops.ternary.unpack(self.codes) == 0).float().mean().item()


def _grouped(weight: Tensor, group: int) -> Tensor:
    """[n, k] -> fp32 [n, groups, group], [1, 1, n k] for one scale a tensor."""
    n, k = weight.shape
    return weight.detach().float().reshape((n, k // group, group) if group else (1, 1, n * k))


def _keep_twn(magnitude: Tensor) -> Tensor:
    """Ternary Weight Networks (arXiv 1605.04711, eq. 5-6): code 0 up to the threshold 0.7 mean |w|.

    For any threshold the best scale is the mean |w| of the weights above it (eq. 5); the best threshold
    (eq. 6) is near 0.7 mean |w| for normal and uniform weights.
    """
    return magnitude > 0.7 * magnitude.mean(-1, keepdim=True, dtype=torch.float64)


def _keep_mse(magnitude: Tensor) -> Tensor:
    """The least squared error of each group, exactly: eq. 6 of arXiv 1605.04711 solved, not approximated.

    With the k largest |w| kept, of sum S_k, the best scale is S_k / k and the error sum w^2 - S_k^2 / k: the
    best k is argmax S_k^2 / k. It keeps all or none of equal |w|, for along them S_k^2 / k is convex in k.
    """
    largest = magnitude.sort(-1, descending=True).values
    k = torch.arange(1, magnitude.shape[-1] + 1, dtype=torch.float64, device=magnitude.device)
    gain = largest.cumsum(-1, dtype=torch.float64).square() / k
    return magnitude >= largest.gather(-1, gain.argmax(-1, keepdim=True))


def _keep_all(magnitude: Tensor) -> Tensor:
    """Binary weights (XNOR-Net, arXiv 1603.05279): code sign(w), scale mean |w|; 0 stays 0."""
    return torch.ones_like(magnitude, dtype=torch.bool)


_KEEP = {"twn": _keep_twn, "mse": _keep_mse, "binary": _keep_all}


def _round_scales(scales: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """scales [n, groups] of the groups w [n, groups, group] in `dtype`; not finite where a weight is not."""
    scales = scales + 0 * w.sum(-1, dtype=torch.float64)  # 0 * inf and 0 * nan are nan
    rounded = scales.to(dtype)
    if not rounded.is_cuda and not rounded.isfinite().all():
        row, group = (~rounded.isfinite()).nonzero()[0].tolist()
        raise RuntimeError(
            f"the scale of group [{row}, {group}] is {scales[row, group]:.3g}, expected finite weights and a "
            f"scale up to {torch.finfo(dtype).max:.3g}, the largest {dtype}"
        )
    return rounded


class _StraightThrough(torch.autograd.Function):
    """The rounded weight forward; backward the identity to the weight (Bengio et al., arXiv 1308.3432).

    Trained scales get sum grad * code of their group. The rounding of a scale, and its floor 0, pass it on.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, scales: Tensor | None, ternary: TernaryWeight, dtype) -> Tensor:
        ctx.save_for_backward(ternary.codes)
        ctx.scales_shape = ternary.scales.shape
        return ternary.dequantize(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None
        products = grad.float() * torch.ops.ternary.unpack(*ctx.saved_tensors)
        groups = products.unflatten(1, (ctx.scales_shape[1], -1)).sum(-1)
        return grad, groups.sum_to_size(ctx.scales_shape), None, None


class FakeQuantize(nn.Module):
    """The parametrization that QAT puts on a layer's `weight`: latent fp32 [n, k] -> code * scale in `dtype`.

    Its value is exactly what packing the latent weight stores; its gradient goes straight through.

    A rule that trains scales has a parameter fp32 [n, groups] or [1, 1], in the model's state dict
    `….parametrizations.weight.0.scale` or `.logit`. Its code is round(clip(w / scale, -1, 1)) and, with the
    value q, dL/dscale = sum of dL/dq * code over the group:
    - "learned": `scale`, absmean at first. The step size of LSQ (arXiv 1902.08153), its gradient without the
      term of the distance to the code. Such scales collapse from a pretrained model (arXiv 2606.18114): they
      grow until most codes are 0. Below 0 it counts as 0.
    - "bounded": `logit`, 0 at first; scale = absmean * 2 sigmoid(logit), absmean that of the latent weight at
      each step and a constant in the gradient. The factor is that of CAT-Q (arXiv 2606.26650).
    - "shifted": `scale` and `shift` [k], q = sign(w) scale + shift of each column: the binary weights of
      Bi-Mamba (arXiv 2411.11843), which begin as mean |w - shift| and the mean. Nothing packed holds them.
    """

    def __init__(self, config: TernaryConfig, latent: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        latent = latent.detach()
        if config.rule == "learned":
            group, dtype = config.group_of(latent.shape[1]), config.torch_scale_dtype
            _, scales = torch.ops.ternary.quantize(latent.contiguous(), group, dtype)
            self.scale = nn.Parameter(scales.float())
        elif config.rule == "bounded":
            self.logit = nn.Parameter(latent.new_zeros(config.scales_shape(*latent.shape)))
        elif config.rule == "shifted":
            mean = latent.float().mean(0)
            self.scale, self.shift = nn.Parameter((latent - mean).abs().mean(0)), nn.Parameter(mean)

    @staticmethod
    @torch.no_grad()
    def packed(layer: nn.Module) -> TernaryWeight:
        """What training sees of a layer that has this parametrization."""
        weight = layer.parametrizations.weight
        fake = weight[-1]
        return TernaryWeight.from_float(weight.original, fake.config, fake.scales(weight.original))

    def scales(self, latent: Tensor) -> Tensor | None:
        """The trained scales before rounding; None under a rule that trains none."""
        if self.config.rule == "learned":
            return self.scale
        if self.config.rule == "bounded":
            group = self.config.group_of(latent.shape[1])
            absmean = _grouped(latent, group).abs().mean(-1, dtype=torch.float64)
            return absmean * 2 * self.logit.sigmoid()
        return None

    def forward(self, latent: Tensor) -> Tensor:
        kind, dtype = latent.device.type, self.dtype
        if dtype == torch.float32 and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)  # what autocast would round an fp32 weight to
        if self.config.rule == "absmean":
            group = self.config.group_of(latent.shape[1])
            return torch.ops.ternary.fake_quantize(latent, group, self.config.torch_scale_dtype, dtype)
        if self.config.rule == "shifted":
            straight_through = latent - latent.detach()  # 0, whose gradient is the identity
            return (latent.detach().sign() * self.scale + self.shift + straight_through).to(dtype)
        scales = self.scales(latent)
        ternary = TernaryWeight.from_float(latent, self.config, scales)
        return _StraightThrough.apply(latent, scales, ternary, dtype)
