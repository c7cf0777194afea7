"""The modules of a Mamba language model: packed linear and embedding, and the mixers of both generations.

Parameter names are those of transformers and mamba_ssm. Mixers take a state to go on from and update it in
place; a single token with a state runs the one-step operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .config import MambaConfig, TernaryConfig
from .quantizer import FakeQuantize, TernaryWeight


class TernaryLinear(nn.Module):
    """y [..., n] = x [..., k] weight^T + bias with a packed weight; runs torch.ops.ternary.gemm.

    weight uint8 [n, k / 4] holds the codes, weight_scale [n, groups] or [1, 1] the scales (docs/format.md).
    `activations` "fp8" (Hopper) and "a8" (CPU) round x first: faster, less exact (docs/operators.md).
    """

    activations: str = "a16"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: TernaryConfig,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.config = in_features, out_features, config
        scales = torch.zeros(config.scales_shape(out_features, in_features), device=device)
        codes = torch.zeros(out_features, in_features // 4, dtype=torch.uint8, device=device)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scales.to(config.torch_scale_dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: TernaryConfig) -> TernaryLinear:
        """Rounds the linear's weight; one under QAT to the value that training saw."""
        ternary = _rounded(linear, config)
        packed = cls(linear.in_features, linear.out_features, config, bias=False, device="meta")
        packed.weight, packed.weight_scale, packed.bias = ternary.codes, ternary.scales, linear.bias
        return packed

    @property
    def ternary(self) -> TernaryWeight:
        return TernaryWeight(self.weight, self.weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.ternary.gemm(x, self.weight, self.weight_scale, self.bias, self.activations)

    def _apply(self, fn, recurse=True):
        return super()._apply(_keep_dtype(fn, self.weight_scale), recurse)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.config.group_size}, bias={self.bias is not None}"
        )


class PackedTable(nn.Module):
    """A token table in fewer than 16 bits: embedding, head, or both where they are tied."""

    def __init__(self, weight: Tensor, weight_scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """ids [...] -> rows [..., d] in `dtype`."""
        raise NotImplementedError

    def logits(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., v]."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        return super()._apply(_keep_dtype(fn, self.weight_scale), recurse)


class Int8Table(PackedTable):
    """int8 rows with one scale each: weight int8 [v, d], weight_scale [v, 1] = max |row| / 127."""

    def __init__(self, rows: int, dim: int, scale_dtype: torch.dtype, device=None) -> None:
        weight = torch.zeros(rows, dim, dtype=torch.int8, device=device)
        super().__init__(weight, torch.zeros(rows, 1, dtype=scale_dtype, device=device))

    @classmethod
    def from_float(cls, weight: Tensor, scale_dtype: torch.dtype) -> Int8Table:
        table = cls(*weight.shape, scale_dtype, device="meta")
        w = weight.detach().float()
        scale = (w.abs().amax(1, keepdim=True) / 127).to(scale_dtype)
        divisor = scale.float().masked_fill(scale == 0, 1)
        table.weight_scale = scale
        table.weight = (w / divisor).round().clamp(-127, 127).to(torch.int8)
        return table

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return (F.embedding(ids, self.weight).float() * F.embedding(ids, self.weight_scale)).to(dtype)

    def logits(self, x: Tensor) -> Tensor:
        return torch.ops.ternary.int8_linear(x, self.weight, self.weight_scale)


class TernaryTable(PackedTable):
    """Ternary rows: weight uint8 [v, d / 4] and weight_scale [v, groups] or [1, 1], as in TernaryLinear."""

    def __init__(self, rows: int, dim: int, config: TernaryConfig, device=None) -> None:
        scales = torch.zeros(config.scales_shape(rows, dim), dtype=config.torch_scale_dtype, device=device)
        super().__init__(torch.zeros(rows, dim // 4, dtype=torch.uint8, device=device), scales)
        self.dim, self.config = dim, config

    @classmethod
    def from_dense(cls, table: nn.Embedding | nn.Linear, config: TernaryConfig) -> TernaryTable:
        """Rounds the table's weight; one under QAT to the value that training saw."""
        ternary = _rounded(table, config)
        rows, columns = ternary.codes.shape
        packed = cls(rows, 4 * columns, config, device="meta")
        packed.weight, packed.weight_scale = ternary.codes, ternary.scales
        return packed

    @property
    def ternary(self) -> TernaryWeight:
        return TernaryWeight(self.weight, self.weight_scale)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        flat, scales = ids.flatten(), self.weight_scale
        if self.config.group_size != "tensor":
            scales = F.embedding(flat, scales)
        rows = torch.ops.ternary.dequantize(F.embedding(flat, self.weight), scales, dtype)
        return rows.view(*ids.shape, self.dim)

    def logits(self, x: Tensor) -> Tensor:
        return torch.ops.ternary.gemm(x, self.weight, self.weight_scale)


class GatedRMSNorm(nn.Module):
    """RMSNorm of y * silu(z), or RMSNorm(y) * silu(z) if norm_before_gate, in `groups` parts."""

    def __init__(self, config: MambaConfig, device=None, dtype=None) -> None:
        super().__init__()
        self.groups, self.norm_before_gate = config.norm_groups, config["norm_before_gate"]
        self.eps = config.norm_epsilon
        self.weight = nn.Parameter(torch.ones(config.d_inner, device=device, dtype=dtype))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        # In training the operator would compute its result first and the plain form again for the gradient.
        plain = torch.is_grad_enabled() and self.weight.requires_grad
        norm = reference.rms_norm_gated if plain else torch.ops.ternary.rms_norm_gated
        return norm(y, z, self.weight, self.groups, self.eps, self.norm_before_gate)


class _Mixer(nn.Module):
    """What both generations share: projections, convolution, and dynamics that stay in fp32."""

    dynamics: tuple[str, ...]  # names of the parameters that keep float32 when the model is cast

    def __init__(
        self,
        config: MambaConfig,
        ternary: TernaryConfig | None = None,
        name: str = "",
        device=None,
        dtype=None,
    ) -> None:
        """ternary: packed projections to load into, those that it selects under the mixer's full `name`."""
        super().__init__()
        self.config = config
        channels, bias, options = config.conv_channels, config["bias"], {"device": device, "dtype": dtype}
        self.in_proj = _projection(
            f"{name}.in_proj", config.d_model, config.in_proj_rows, bias, ternary, options
        )
        self.conv1d = nn.Conv1d(
            channels, channels, config.d_conv, groups=channels, bias=config["conv_bias"], **options
        )
        self.out_proj = _projection(
            f"{name}.out_proj", config.d_inner, config.d_model, bias, ternary, options
        )

    def _apply(self, fn, recurse=True):
        # The recurrence is sensitive to A, D and dt_bias.
        return super()._apply(_keep_dtype(fn, *(getattr(self, name) for name in self.dynamics)), recurse)

    def _convolve(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """x [b, l, c] -> silu(conv(x)) [b, l, c]; state [b or q, w - 1, c] is updated in place."""
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if state is not None and x.shape[1] == 1 and cu_seqlens is None:
            return torch.ops.ternary.causal_conv1d_update(x.squeeze(1), state, weight, bias).unsqueeze(1)
        y, final = torch.ops.ternary.causal_conv1d(x, weight, bias, state, cu_seqlens)
        if state is not None:
            state.copy_(final)
        return y if mask is None else y * mask.unsqueeze(-1).to(y.dtype)


class Mamba2(_Mixer):
    """Mamba-2's mixer (arXiv 2405.21060, section 7): in_proj -> conv -> ssd -> gated norm -> out_proj."""

    dynamics = ("dt_bias", "A_log", "D")

    def __init__(
        self,
        config: MambaConfig,
        ternary: TernaryConfig | None = None,
        name: str = "",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(config, ternary, name, device, dtype)
        h = config.nheads
        self.dt_bias = nn.Parameter(_initial_dt_bias(h, device))
        self.A_log = nn.Parameter(torch.empty(h, device=device).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(config.d_inner if config["D_has_hdim"] else h, device=device))
        self.norm = GatedRMSNorm(config, device, dtype) if config["rmsnorm"] else None

    def forward(
        self,
        u: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """u [b, l, d_model] -> [b, l, d_model]. States (config.state_shape) are updated in place.

        mask [b, l]: 0 for padding before a sequence, where u is 0 as well: it leaves the states as they are.
        """
        c = self.config
        z, xBC, dt = self.in_proj(u).split([c.d_inner, c.conv_channels, c.nheads], dim=-1)
        xBC = self._convolve(xBC, conv_state, cu_seqlens, mask)
        x, B, C = xBC.split([c.d_inner, c.ngroups * c.d_state, c.ngroups * c.d_state], dim=-1)
        x, z_heads = (v.unflatten(-1, (c.nheads, c.headdim)) for v in (x, z))
        B, C = (v.unflatten(-1, (c.ngroups, c.d_state)) for v in (B, C))
        A = -torch.exp(self.A_log)
        D = self.D.view(c.nheads, c.headdim) if c["D_has_hdim"] else self.D
        gate = z_heads if self.norm is None else None
        if ssm_state is not None and u.shape[1] == 1 and cu_seqlens is None:
            x, dt, B, C = (v.squeeze(1) for v in (x, dt, B, C))
            gate = None if gate is None else gate.squeeze(1)
            y = torch.ops.ternary.ssd_update(
                x, ssm_state, dt, A, B, C, D, gate, self.dt_bias, True, *c.dt_limit
            ).unsqueeze(1)
        else:
            y, final = torch.ops.ternary.ssd(
                x, dt, A, B, C, D, gate, self.dt_bias, True, *c.dt_limit, ssm_state, cu_seqlens
            )
            if ssm_state is not None:
                ssm_state.copy_(final)
        y = y.flatten(-2)
        return self.out_proj(y if self.norm is None else self.norm(y, z))


class Mamba(_Mixer):
    """Mamba-1's mixer (arXiv 2312.00752, 3.4): in_proj -> conv -> x_proj, dt_proj -> scan -> out_proj."""

    dynamics = ("A_log", "D")

    def __init__(
        self,
        config: MambaConfig,
        ternary: TernaryConfig | None = None,
        name: str = "",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(config, ternary, name, device, dtype)
        d, n, rank = config.d_inner, config.d_state, config.dt_rank
        options = {"device": device, "dtype": dtype}
        self.x_proj = _projection(f"{name}.x_proj", d, rank + 2 * n, False, ternary, options)
        self.dt_proj = _projection(f"{name}.dt_proj", rank, d, True, ternary, options)
        A = torch.arange(1, n + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(A.log().repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d, device=device))
        with torch.no_grad():
            self.dt_proj.bias.copy_(_initial_dt_bias(d, device))
            if isinstance(self.dt_proj, nn.Linear):
                nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)

    def forward(
        self,
        u: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """u [b, l, d_model] -> [b, l, d_model]. States (config.state_shape) are updated in place.

        mask [b, l]: 0 for padding before a sequence, where u is 0 as well: it leaves the states as they are.
        """
        c = self.config
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = self._convolve(x, conv_state, cu_seqlens, mask)
        dt, B, C = self.x_proj(x).split([c.dt_rank, c.d_state, c.d_state], dim=-1)
        dt_bias = self.dt_proj.bias.float()  # added in fp32 by the scan: in 16 bits it would cost 1 % of dt
        A = -torch.exp(self.A_log)
        if ssm_state is not None and u.shape[1] == 1 and cu_seqlens is None:
            dt = _without_bias(self.dt_proj, dt)
            x, dt, B, C, z = (v.squeeze(1) for v in (x, dt, B, C, z))
            y = torch.ops.ternary.selective_scan_update(x, ssm_state, dt, A, B, C, self.D, z, dt_bias)
            return self.out_proj(y.unsqueeze(1))
        packed = isinstance(self.dt_proj, TernaryLinear)
        weight = self.dt_proj.weight if packed else self.dt_proj.weight.to(x.dtype)
        scales = self.dt_proj.weight_scale if packed else None
        y, final = torch.ops.ternary.selective_scan_fused(
            x, dt, weight, scales, A, B, C, self.D, z, dt_bias, ssm_state, cu_seqlens
        )
        if ssm_state is not None:
            ssm_state.copy_(final)
        return self.out_proj(y)


class TernaryMamba2(Mamba2):
    """A Mamba-2 mixer whose projections are TernaryLinear, to load packed weights into."""

    def __init__(
        self, config: MambaConfig, ternary: TernaryConfig, name: str = "", device=None, dtype=None
    ) -> None:
        super().__init__(config, ternary, name, device, dtype)


class TernaryMamba(Mamba):
    """A Mamba-1 mixer whose projections are TernaryLinear, to load packed weights into."""

    def __init__(
        self, config: MambaConfig, ternary: TernaryConfig, name: str = "", device=None, dtype=None
    ) -> None:
        super().__init__(config, ternary, name, device, dtype)


def _rounded(layer: nn.Module, config: TernaryConfig) -> TernaryWeight:
    if hasattr(layer, "parametrizations"):
        return FakeQuantize.packed(layer)
    return TernaryWeight.from_float(layer.weight, config)


def _keep_dtype(fn: Callable[[Tensor], Tensor], *fixed: Tensor) -> Callable[[Tensor], Tensor]:
    """`fn` of Module._apply for a module whose `fixed` tensors keep their dtype when it is cast."""

    def apply(tensor: Tensor) -> Tensor:
        if any(tensor is t for t in fixed):  # seen as bytes it follows a move and ignores a cast
            return fn(tensor.view(torch.uint8)).view(tensor.dtype)
        return fn(tensor)

    return apply


def _projection(name: str, k: int, n: int, bias: bool, ternary: TernaryConfig | None, options) -> nn.Module:
    if ternary is not None and ternary.selects(name):
        return TernaryLinear(k, n, ternary, bias, **options)
    return nn.Linear(k, n, bias, **options)


def _without_bias(linear: nn.Module, x: Tensor) -> Tensor:
    if isinstance(linear, TernaryLinear):
        return torch.ops.ternary.gemm(x, linear.weight, linear.weight_scale)
    return F.linear(x, linear.weight)


def _initial_dt_bias(size: int, device) -> Tensor:
    """Inverse softplus of step sizes drawn log-uniformly from 0.001 to 0.1."""
    dt = torch.exp(torch.empty(size, device=device).uniform_(math.log(1e-3), math.log(1e-1)))
    return dt + torch.log(-torch.expm1(-dt))
