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
    def from_float(cls, weight: Tensor, config: TernaryConfig) -> TernaryWeight:
        """Rounds weight [n, k] by the config's rule. ValueError if the group size does not divide k."""
        group, dtype = config.group_of(weight.shape[1]), config.torch_scale_dtype
        return cls(*torch.ops.ternary.quantize(weight.detach().contiguous(), group, dtype))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[n, k] = code * scale."""
        return torch.ops.ternary.dequantize(self.codes, self.scales, dtype)

    def zero_ratio(self) -> float:
        """Share of codes that are 0: 0.31 for a Gaussian weight under absmean, towards 0.9 in a collapse."""
        return (torch.ops.ternary.unpack(self.codes) == 0).float().mean().item()


class _StraightThrough(torch.autograd.Function):
    """The rounded weight forward, the identity backward (Bengio et al., arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class FakeQuantize(nn.Module):
    """The parametrization that QAT puts on `Linear.weight`: latent fp32 [n, k] -> code * scale in `dtype`.

    Its value is exactly what packing the latent weight stores; its gradient goes straight through.
    """

    def __init__(self, config: TernaryConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype

    def forward(self, latent: Tensor) -> Tensor:
        rounded = TernaryWeight.from_float(latent, self.config).dequantize(self.dtype)
        return _StraightThrough.apply(latent, rounded)
