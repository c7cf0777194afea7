"""What torch.compile and autograd need to know about torch.ops.ternary.*: fakes and gradients.

Where a GPU has no kernel of ours for an operator, its differentiable form serves there too.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

_OPERATORS = ("quantize", "pack", "unpack", "first_invalid", "dequantize", "gemm", "int8_linear")
_OPERATORS += ("causal_conv1d", "causal_conv1d_update")
_OPERATORS += ("selective_scan", "selective_scan_fused", "selective_scan_update", "ssd", "ssd_update")
_OPERATORS += ("rms_norm_gated", "add_rms_norm", "decode", "prefill", "head", "choose", "fake_quantize")
_OPERATORS += ("distillation", "quantize_fp8")


@torch.library.register_fake("ternary::quantize")
def _(weight: Tensor, group_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    scales = (1, 1) if group_size == 0 else (n, k // group_size)
    return weight.new_empty(n, k // 4, dtype=torch.uint8), weight.new_empty(scales, dtype=scale_dtype)


@torch.library.register_fake("ternary::fake_quantize")
def _(latent: Tensor, group_size: int, scale_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    return latent.new_empty(latent.shape, dtype=dtype)


def _straight_through(ctx, grad: Tensor):
    return grad.float(), None, None, None


torch.library.register_autograd("ternary::fake_quantize", _straight_through)


@torch.library.register_fake("ternary::distillation")
def _(student: Tensor, teacher: Tensor, labels: Tensor, kl_weight: float, temperature: float):
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.new_empty(len(student), dtype=dtype), student.new_empty(len(student), dtype=dtype)


@torch.library.register_fake("ternary::pack")
def _(ternary: Tensor) -> Tensor:
    n, k = ternary.shape
    return ternary.new_empty(n, k // 4, dtype=torch.uint8)


@torch.library.register_fake("ternary::unpack")
def _(codes: Tensor) -> Tensor:
    n, k = codes.shape
    return codes.new_empty(n, k * 4, dtype=torch.int8)


@torch.library.register_fake("ternary::dequantize")
def _(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    n, k = codes.shape
    return codes.new_empty(n, k * 4, dtype=dtype)


@torch.library.register_fake("ternary::quantize_fp8")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(len(x), 1, dtype=torch.float32)


@torch.library.register_fake("ternary::gemm")
def _(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, activations: str = "a16"
) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _save_weight(ctx, inputs, output) -> None:
    _, codes, scales, bias, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(codes, scales)


def _gemm_backward(ctx, dy: Tensor):
    """Nothing flows to codes and scales: training goes through the latent weight. The rounding of x to fewer
    bits counts as the identity."""
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.ternary.dequantize(*ctx.saved_tensors, torch.float32)
        dx = (dy.float() @ weight).to(dy.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        dbias = dy.float().flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return dx, None, None, dbias, None


torch.library.register_autograd("ternary::gemm", _gemm_backward, setup_context=_save_weight)


@torch.library.register_fake("ternary::int8_linear")
def _(x: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], table.shape[0])


def _int8_linear(x: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """int8_linear in x's dtype by torch, some rows widened at a time: 64 MiB in fp32 at k = 2048."""
    rows = zip(table.split(8192), scale.split(8192), strict=True)
    return torch.cat([F.linear(x, w.to(x.dtype)) * s.squeeze(1).to(x.dtype) for w, s in rows], dim=-1)


def _int8_linear_backward(ctx, dy: Tensor):
    """Nothing flows to table and scale."""
    table, scale = ctx.saved_tensors
    return ((dy.float() * scale.float().squeeze(1)) @ table.float()).to(dy.dtype), None, None


torch.library.register_autograd(
    "ternary::int8_linear",
    _int8_linear_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
)


def _states(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences, and so states, the batch x has."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@torch.library.register_fake("ternary::causal_conv1d")
def _(x, weight, bias=None, initial_state=None, cu_seqlens=None, silu=True):
    dtype = x.dtype if initial_state is None else initial_state.dtype
    final_state = x.new_empty(_states(x, cu_seqlens), weight.shape[1] - 1, x.shape[2], dtype=dtype)
    return x.new_empty(x.shape), final_state


@torch.library.register_fake("ternary::selective_scan")
def _(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=True,
    initial_state=None,
    cu_seqlens=None,
):
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    return x.new_empty(x.shape), x.new_empty(_states(x, cu_seqlens), *A.shape, dtype=dtype)


@torch.library.register_fake("ternary::selective_scan_fused")
def _(
    x,
    dt,
    dt_weight,
    dt_scales,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    initial_state=None,
    cu_seqlens=None,
):
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    return x.new_empty(x.shape), x.new_empty(_states(x, cu_seqlens), *A.shape, dtype=dtype)


@torch.library.register_fake("ternary::ssd")
def _(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=True,
    dt_min=0.0,
    dt_max=None,
    initial_state=None,
    cu_seqlens=None,
):
    dtype = torch.float32 if initial_state is None else initial_state.dtype
    size = (_states(x, cu_seqlens), *x.shape[2:], B.shape[3])
    return x.new_empty(x.shape), x.new_empty(size, dtype=dtype)


@torch.library.register_fake("ternary::causal_conv1d_update")
@torch.library.register_fake("ternary::selective_scan_update")
@torch.library.register_fake("ternary::ssd_update")
@torch.library.register_fake("ternary::rms_norm_gated")
def _(x, *_args, **_options):
    return x.new_empty(x.shape)


@torch.library.register_fake("ternary::add_rms_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=weight.dtype)


@torch.library.impl("ternary::add_rms_norm", "Autograd")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, residual, weight)):
        raise RuntimeError("add_rms_norm has no gradient: call it under torch.no_grad or inference_mode")
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.ternary.add_rms_norm(x, residual, weight, eps)


@torch.library.register_fake("ternary::decode")
def _(tokens, embedding, *_args, **_options):
    return embedding.new_empty(*tokens.shape, embedding.shape[1], dtype=torch.float32)


@torch.library.register_fake("ternary::prefill")
def _(tokens, cu_seqlens, embedding, *_args, **_options):
    return embedding.new_empty(*tokens.shape, embedding.shape[1], dtype=torch.float32)


@torch.library.register_fake("ternary::head")
def _(hidden: Tensor, norm: Tensor, table: Tensor, scale: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return norm.new_empty(*hidden.shape[:-1], table.shape[0])


@torch.library.register_fake("ternary::choose")
def _(logits, vocab_size, tokens, chosen, step):
    pass


def _serves(package: str, x: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether another package's GPU kernels take x: in 16 bits alone, since they multiply fp32 as tf32."""
    return x.is_cuda and x.itemsize == 2 and x.numel() > 0 and cu_seqlens is None and bool(find_spec(package))


def _causal_conv1d(x, weight, bias=None, initial_state=None, cu_seqlens=None, silu=True):
    """causal_conv1d in a form that autograd sees through: the causal_conv1d package or the reference."""
    aligned = all(size % 8 == 0 for size in (x.shape[2], *x.stride()[:2])) and x.stride(2) == 1
    fits = aligned and weight.shape[1] in (2, 3, 4) and initial_state is None
    if not fits or not _serves("causal_conv1d", x, cu_seqlens):
        return reference.causal_conv1d(x, weight, bias, initial_state, cu_seqlens, silu)
    from causal_conv1d import causal_conv1d_fn

    y = causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu" if silu else None)
    history = torch.nn.functional.pad(x, (0, 0, weight.shape[1] - 1, 0))
    return y.transpose(1, 2), history[:, x.shape[1] :].clone()


def _ssd(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=True,
    dt_min=0.0,
    dt_max=None,
    initial_state=None,
    cu_seqlens=None,
):
    """ssd in a form that autograd sees through: mamba_ssm's Triton kernels, or else the reference."""
    if not _serves("mamba_ssm", x, cu_seqlens):
        options = (D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, cu_seqlens)
        return reference.ssd(x, dt, A, B, C, *options)
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y, final_state = mamba_chunk_scan_combined(
        *(x, dt, A, B, C),
        chunk_size=256,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial_state,
        dt_softplus=dt_softplus,
        dt_limit=(dt_min, float("inf") if dt_max is None else dt_max),
        return_final_states=True,
    )
    return y, final_state.to(torch.float32 if initial_state is None else initial_state.dtype)


def _differentiate(name: str, function: Callable) -> None:
    """Gives an operator the gradient of `function`, which the backward pass runs again from the inputs."""

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in inputs))
        ctx.options = [None if isinstance(v, Tensor) else v for v in inputs]

    def backward(ctx, *grads):
        pairs = zip(ctx.saved_tensors, ctx.options, strict=True)
        inputs = [option if saved is None else saved.detach() for saved, option in pairs]
        # needs_input_grad is shorter than the inputs: it lacks trailing arguments left at their defaults.
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            for i in wanted:
                inputs[i].requires_grad_()
            outputs = function(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        pairs = [(out, grad) for out, grad in pairs if out.requires_grad]
        result = [None] * len(ctx.needs_input_grad)
        if pairs:
            outputs, grads = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, [inputs[i] for i in wanted], grads, allow_unused=True)
            for i, grad in zip(wanted, found, strict=True):
                result[i] = grad
        return tuple(result)

    torch.library.register_autograd(f"ternary::{name}", backward, setup_context=setup_context)


# Operators whose form without a kernel, or for the gradient, is not simply their reference.
_FUNCTIONS = {"causal_conv1d": _causal_conv1d, "ssd": _ssd, "int8_linear": _int8_linear}
_FUNCTIONS |= {  # by one operator after another
    name: partial(getattr(reference, name), operators=torch.ops.ternary) for name in ("decode", "prefill")
}

for _name in ("causal_conv1d", "selective_scan", "selective_scan_fused", "ssd", "rms_norm_gated"):
    _differentiate(_name, _FUNCTIONS.get(_name, getattr(reference, _name)))


def has_kernel(name: str, device: str) -> bool:
    """Whether the operator has a kernel of ours on "cpu" or "cuda"."""
    return (name, device) not in _WITHOUT_KERNEL


_WITHOUT_KERNEL = {
    (name, device)
    for name in _OPERATORS
    for device in ("cpu", "cuda")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"ternary::{name}", device.upper())
}
for _name, _device in _WITHOUT_KERNEL:
    torch.library.impl(f"ternary::{_name}", _device)(_FUNCTIONS.get(_name, getattr(reference, _name)))
