"""The operators in plain PyTorch: what the kernels must compute.

Every function here has the name, the arguments and the result of one operator of torch.ops.ternary.
Arithmetic is float32 (float64 where an input is), the result is rounded once to its dtype.

Shapes: b batch, l length, c channels, w conv width, d inner channels, h heads, p head dimension,
n state size, g B/C groups, q sequences. Activations are fp32, bf16 or fp16 and all of one dtype.
With `cu_seqlens` (int32 [q + 1], from 0 to l) the q sequences of a variable-length batch lie one after
another in a batch of one, and the states have q rows. States are float32 unless given in 16 bits.
"""

from torch.utils._python_dispatch import TorchDispatchMode

from .model import add_rms_norm, choose, decode, distillation, head, prefill, rms_norm_gated
from .recurrences import (
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_scan_fused,
    selective_scan_update,
    ssd,
    ssd_update,
)
from .weights import (
    dequantize,
    fake_quantize,
    first_invalid,
    gemm,
    int8_linear,
    pack,
    quantize,
    quantize_fp8,
    unpack,
)

__all__ = [
    "ReferenceMode",
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "choose",
    "decode",
    "dequantize",
    "distillation",
    "fake_quantize",
    "first_invalid",
    "gemm",
    "head",
    "int8_linear",
    "pack",
    "prefill",
    "quantize",
    "quantize_fp8",
    "rms_norm_gated",
    "selective_scan",
    "selective_scan_fused",
    "selective_scan_update",
    "ssd",
    "ssd_update",
    "unpack",
]


class ReferenceMode(TorchDispatchMode):
    """Inside `with ReferenceMode():` every torch.ops.ternary.* call runs the function of that name here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ternary":
            func = globals()[func.overloadpacket.__name__]
        return func(*args, **(kwargs or {}))
