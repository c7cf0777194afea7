"""How a model runs where autograd watches, and a frozen teacher beside it.

A Mamba-2 model in 16 bits on a GPU, where mamba_ssm and causal_conv1d can be imported, has its forward from
our operators and its backward from their kernels. Any other model runs block after block.

Memory: of such a block backward keeps the residual stream, the projected input and the output of the scan;
the normed input is computed again. Of a share of the blocks (Backbone.recompute) the projected input is
computed again as well, which halves what such a block keeps; elsewhere these blocks keep their input alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Mamba2, TernaryLinear

if TYPE_CHECKING:
    from .models import Backbone, Block


CHUNK = 128  # tokens of a chunk in mamba_ssm's backward; any value gives the same result


@cache
def _importable() -> bool:
    return all(find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d"))


def is_fused(backbone: Backbone, ids: Tensor) -> bool:
    """Whether mamba_ssm's kernels serve the model as it is: Mamba-2, dense or fake-quantized, in 16 bits."""
    c, kind = backbone.config, ids.device.type
    dtype = backbone.norm_f.weight.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    shapes = c.is_mamba2 and c["rmsnorm"] and c.norm_groups == c.ngroups and c.d_conv in (2, 3, 4)
    packed = any(isinstance(block.mixer.in_proj, TernaryLinear) for block in backbone.layers)
    runs = kind == "cuda" and dtype.itemsize == 2 and ids.numel() > 0
    return shapes and not packed and runs and _importable()


def run(backbone: Backbone, ids: Tensor) -> Tensor:
    """ids [b, l] -> hidden states [b, l, d_model], of whole sequences from their start."""
    layers, x = backbone.layers, backbone.embeddings(ids)
    again = round(backbone.recompute * len(layers))
    if not is_fused(backbone, ids):
        for i, block in enumerate(layers):
            x = checkpoint(block, x, use_reentrant=False) if i < again else block(x)
        return backbone.norm_f(x.to(backbone.norm_f.weight.dtype))
    residual = None
    for i, block in enumerate(layers):
        x, residual = block(x, residual, form=partial(_fused_block, drop_projection=i < again))
    return _add_norm(x, residual, backbone.norm_f, backbone.config.residual_in_fp32)[0]


def frozen(backbone: Backbone, ids: Tensor) -> Tensor:
    """The same of a model that is not trained: no gradient, and each sum is fused with the norm after it."""
    norms = [*(block.norm for block in backbone.layers[1:]), backbone.norm_f]
    if not all(isinstance(norm, nn.RMSNorm) for norm in norms):
        return backbone(ids)
    x = backbone.embeddings(ids)
    residual = x.to(torch.float32 if backbone.config.residual_in_fp32 else x.dtype, copy=True)
    x = backbone.layers[0].norm(x)
    for block, norm in zip(backbone.layers, norms, strict=True):
        x = torch.ops.ternary.add_rms_norm(block.mixer(x), residual, norm.weight, norm.eps)
    return x


def _fused_block(
    block: Block, x: Tensor, residual: Tensor | None, drop_projection: bool
) -> tuple[Tensor, Tensor]:
    """(mixer(norm(residual + x)), residual + x)"""
    mixer, norm = block.mixer, block.norm
    u, residual = _add_norm(x, residual, norm, block.residual_in_fp32)
    weight, bias, dtype = mixer.in_proj.weight, mixer.in_proj.bias, u.dtype

    def again() -> list[Tensor]:
        u = _norm(residual, norm, dtype)
        if not drop_projection:
            return [u]
        return [u, F.linear(u, weight.to(dtype), None if bias is None else bias.to(dtype))]

    dropped = Dropped(again)
    with torch.autograd.graph.saved_tensors_hooks(dropped.pack, dropped.unpack):
        dropped.add(u)
        zxbcdt = mixer.in_proj(u)
        if drop_projection:
            dropped.add(zxbcdt)
        return _fused_mamba2(mixer, zxbcdt), residual


class Dropped:
    """Tensors that autograd does not keep: `again` computes them, in the order of add, when backward asks for
    the first, and they are freed when it has had the last."""

    def __init__(self, again: Callable[[], list[Tensor]]) -> None:
        self.again, self.storages, self.values, self.packed, self.left = again, [], [], 0, 0

    def add(self, tensor: Tensor) -> None:
        self.storages.append(tensor.untyped_storage().data_ptr())

    def pack(self, tensor: Tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self.storages:
            return tensor
        self.packed += 1
        place = tensor.size(), tensor.stride(), tensor.storage_offset()  # it may be a view
        return self.storages.index(pointer), place

    def unpack(self, packed):
        if isinstance(packed, Tensor):
            return packed
        if not self.values:
            with torch.no_grad():
                self.values, self.left = self.again(), self.packed
        index, place = packed
        tensor = self.values[index].as_strided(*place)
        self.left -= 1
        if self.left == 0:
            self.values = []
        return tensor


def _fused_mamba2(mixer: Mamba2, zxbcdt: Tensor) -> Tensor:
    """The mixer after its in_proj: zxbcdt [b, l, rows] -> [b, l, d_model]."""
    c, out_proj = mixer.config, mixer.out_proj
    low, high = c.dt_limit
    return _mixer_function().apply(
        zxbcdt,
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        mixer.dt_bias,
        -torch.exp(mixer.A_log),
        mixer.D.view(c.nheads, c.headdim) if c["D_has_hdim"] else mixer.D,
        CHUNK,
        None,
        None,
        (low, math.inf if high is None else high),
        False,
        "silu",
        mixer.norm.weight,
        c.norm_epsilon,
        out_proj.weight,
        out_proj.bias,
        c.headdim,
        c.ngroups,
        c["norm_before_gate"],
    )


@cache
def _mixer_function() -> type[torch.autograd.Function]:
    from mamba_ssm.ops.triton.layernorm_gated import _layer_norm_fwd
    from mamba_ssm.ops.triton.ssd_combined import MambaSplitConv1dScanCombinedFn

    class Mixer(MambaSplitConv1dScanCombinedFn):
        """conv -> ssd -> gated norm -> out_proj, with the arguments and the backward of its base, for which
        it saves what the base's own forward saves."""

        @staticmethod
        @partial(torch.amp.custom_fwd, device_type="cuda")
        def forward(ctx, zxbcdt, conv_weight, conv_bias, dt_bias, A, D, chunk_size, initial_states, seq_idx,
                    dt_limit, return_final_states, activation, norm_weight, norm_eps, out_weight, out_bias,
                    headdim, ngroups, norm_before_gate):  # fmt: skip
            d_inner, channels, heads = len(norm_weight), len(conv_weight), len(A)
            z, xBC, dt = zxbcdt.split([d_inner, channels, heads], dim=-1)
            xBC, _ = torch.ops.ternary.causal_conv1d(xBC, conv_weight, conv_bias)
            state_columns = (channels - d_inner) // 2
            x, B, C = xBC.split([d_inner, state_columns, state_columns], dim=-1)
            B, C = (v.unflatten(-1, (ngroups, -1)) for v in (B, C))
            limits = dt_limit[0], None if dt_limit[1] == math.inf else dt_limit[1]
            y, _ = torch.ops.ternary.ssd(
                x.unflatten(-1, (heads, headdim)), dt, A, B, C, D, None, dt_bias, True, *limits
            )
            out, _, rstd = _layer_norm_fwd(
                y.view(-1, d_inner), norm_weight, None, norm_eps, z.flatten(0, 1),
                group_size=d_inner // ngroups, norm_before_gate=norm_before_gate, is_rms_norm=True,
            )  # fmt: skip
            out_weight = out_weight.to(out.dtype)
            out_bias = None if out_bias is None else out_bias.to(out.dtype)
            ctx.save_for_backward(
                zxbcdt, conv_weight, conv_bias, y, A, D, dt_bias, None, None,
                norm_weight, rstd, out_weight, out_bias,
            )  # fmt: skip
            ctx.chunk_size, ctx.dt_limit, ctx.activation = chunk_size, dt_limit, activation
            ctx.rmsnorm_eps, ctx.norm_before_gate = norm_eps, norm_before_gate
            ctx.headdim, ctx.ngroups, ctx.return_final_states = headdim, ngroups, False
            ctx.outproj_weight_dtype = out_weight.dtype
            return F.linear(out, out_weight, out_bias).view(*zxbcdt.shape[:2], -1)

    return Mixer


def _add_norm(x: Tensor, residual: Tensor | None, norm: nn.Module, in_fp32: bool) -> tuple[Tensor, Tensor]:
    """(norm(residual + x), residual + x)"""
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn

    options = {"eps": norm.eps, "prenorm": True, "residual_in_fp32": in_fp32}
    is_rms = isinstance(norm, nn.RMSNorm)
    bias = None if is_rms else norm.bias
    u, residual = layer_norm_fn(x, norm.weight, bias, residual, is_rms_norm=is_rms, **options)
    if torch.is_autocast_enabled(x.device.type):
        u = u.to(torch.get_autocast_dtype(x.device.type))
    return u, residual


def _norm(x: Tensor, norm: nn.Module, dtype: torch.dtype) -> Tensor:
    """What _add_norm gave of the sum x."""
    from mamba_ssm.ops.triton.layer_norm import _layer_norm_fwd

    is_rms = isinstance(norm, nn.RMSNorm)
    bias = None if is_rms else norm.bias
    options = {"out_dtype": dtype, "is_rms_norm": is_rms}
    return _layer_norm_fwd(x.flatten(0, -2), norm.weight, bias, norm.eps, **options)[0].view_as(x)
