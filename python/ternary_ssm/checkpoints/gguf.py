"""GGUF, the single file of llama.cpp: its names, and writing it with the package gguf.

Weights are F16, or ternary in TQ blocks: 256 weights of a row and one fp16 scale (docs/format.md).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import MambaConfig, TernaryConfig
from .files import CheckpointError, sync
from .gguf_tokenizer import token_keys

TYPES = ("f16", "tq2_0", "tq1_0")
BLOCK = 256  # weights

_OUTER = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"}
_LAYER = {
    "attn_norm.weight": "norm.weight",
    "ssm_in.weight": "mixer.in_proj.weight",
    "ssm_conv1d.weight": "mixer.conv1d.weight",
    "ssm_conv1d.bias": "mixer.conv1d.bias",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_out.weight": "mixer.out_proj.weight",
}
_MAMBA1 = {"ssm_x.weight": "x_proj.weight", "ssm_dt.weight": "dt_proj.weight", "ssm_dt.bias": "dt_proj.bias"}
_MAMBA2 = {"ssm_dt.bias": "dt_bias", "ssm_norm.weight": "norm.weight"}


def names_of(is_mamba2: bool, n_layer: int) -> dict[str, str]:
    """The name in GGUF -> ours."""
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in _OUTER.items()}
    own = {key: f"mixer.{name}" for key, name in (_MAMBA2 if is_mamba2 else _MAMBA1).items()}
    for i in range(n_layer):
        names |= {f"blk.{i}.{key}": f"backbone.layers.{i}.{name}" for key, name in (_LAYER | own).items()}
    return names


def write(
    path: str | Path,
    config: MambaConfig,
    ternary: TernaryConfig | None,
    tensors: Mapping[str, Tensor],
    source: Path,
    kind: str,
) -> None:
    """Writes one file, which appears under its name when it is whole.

    source: the directory with tokenizer.json. kind: one of TYPES: "f16" widens ternary weights.
    Raises CheckpointError on what llama.cpp or the type cannot express: nothing is approximated but by F16.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"{path}: needs the package gguf: pip install 'ternary-ssm[gguf]'") from error
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory, expected the name of a file")
    if kind not in TYPES:
        raise CheckpointError(f"{path}: type is {kind!r}, expected one of {', '.join(TYPES)}")
    if kind != "f16" and ternary is None:
        raise CheckpointError(f"{path}: {kind} needs a ternary model, found a dense one; expected type f16")
    _check_expressible(path, config)
    arch = "mamba2" if config.is_mamba2 else "mamba"
    staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    writer = gguf.GGUFWriter(staging, arch)
    try:
        _add_keys(writer, config, kind)
        for add, value in token_keys(source / "tokenizer.json", config):
            getattr(writer, add)(value)
        ours = {name: key for key, name in names_of(config.is_mamba2, config.n_layer).items()}
        for name in (name for name in tensors if not name.endswith("_scale")):
            for key, array, dtype in _encode(path, name, ours[name], tensors, config, kind):
                writer.add_tensor(key, array, raw_dtype=gguf.GGMLQuantizationType[dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        sync(staging)
        os.replace(staging, path)
        sync(path.parent)
    except BaseException:
        writer.close()
        staging.unlink(missing_ok=True)
        raise


def _check_expressible(path: Path, config: MambaConfig) -> None:
    expected = {"rms_norm": (config.rms_norm, True), "bias": (config["bias"], False)}
    expected["conv_bias"] = (config["conv_bias"], True)
    if config.is_mamba2:
        for name, value in (("rmsnorm", True), ("norm_before_gate", False), ("D_has_hdim", False)):
            expected[name] = (config[name], value)
        expected["norm_groups"] = (config.norm_groups, config.ngroups)
        expected["dt_limit"] = (config.dt_limit, (0.0, None))
    else:
        expected["expand"] = (config["expand"], 2)
    for name, (found, value) in expected.items():
        if found != value:
            raise CheckpointError(f"{path}: {name} is {found!r}, llama.cpp runs only {value!r}")


def _add_keys(writer: Any, config: MambaConfig, kind: str) -> None:
    import gguf

    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(2**20)  # there is no limit, and llama.cpp wants one
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.n_layer)
    writer.add_vocab_size(config.vocab_size)  # the table's rows may be more
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.d_state)
    writer.add_ssm_time_step_rank(config.nheads if config.is_mamba2 else config.dt_rank)
    if config.is_mamba2:
        writer.add_ssm_group_count(config.ngroups)


def _encode(
    path: Path, name: str, key: str, tensors: Mapping[str, Tensor], config: MambaConfig, kind: str
) -> Iterator[tuple[str, np.ndarray, str]]:
    """(key, array, type) of a tensor and perhaps of its scale."""
    tensor, scales = tensors[name].detach().cpu(), tensors.get(f"{name}_scale")
    where = f"{path}: {name}"
    # A ternary token table goes as F16, a type that every build of llama.cpp takes there.
    wide = tensor.dtype == torch.uint8 and key in ("token_embd.weight", "output.weight")
    if scales is not None and kind != "f16" and not wide:
        scales = scales.cpu()
        if tensor.dtype == torch.int8:
            yield key, _encode_int8(where, tensor, scales), "Q8_0"
            return
        d, outer = _block_scales(where, scales, 4 * tensor.shape[1])
        if outer is not None:
            if not key.endswith(("ssm_in.weight", "ssm_out.weight")):
                raise CheckpointError(f"{where} has a {scales.dtype} scale, llama.cpp wants float16 there")
            yield key.replace(".weight", ".scale"), outer.numpy(), "F32"
        yield key, _encode_ternary(tensor, d, kind), kind.upper()
        return
    if scales is not None:
        if tensor.dtype == torch.uint8:
            tensor = torch.ops.ternary.dequantize(tensor, scales.cpu(), torch.float32)
        else:
            tensor = tensor.float() * scales.cpu().float()
    if tensor.dim() == 2 and key.endswith(".weight"):
        half = tensor.half()
        if not half.isfinite().all():
            raise CheckpointError(f"{where} has values beyond F16's ±65504 or NaN, expected finite ones")
        yield key, half.numpy(), "F16"
        return
    tensor = tensor.float()
    if name.endswith("A_log"):
        tensor = -tensor.exp()
    if name.endswith("conv1d.weight"):
        tensor = tensor.squeeze(1)
    elif config.is_mamba2 and name.endswith((".A_log", ".D")):
        tensor = tensor.unsqueeze(1)
    elif name.endswith("mixer.norm.weight"):
        tensor = tensor.unflatten(0, (config.ngroups, -1))
    yield key, tensor.contiguous().numpy(), "F32"


def _block_scales(where: str, scales: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
    """fp16 scales [n or 1, k / 256], and an fp32 factor [1] of the whole tensor where fp16 is too narrow."""
    if k % BLOCK:
        raise CheckpointError(
            f"{where} has {k} columns, expected a multiple of {BLOCK}, the block of TQ types"
        )
    by32 = scales.repeat_interleave(k // 32 // scales.shape[1], 1)  # group sizes are multiples of 32
    by_block = by32.unflatten(1, (-1, BLOCK // 32))
    if (differ := (by_block != by_block[..., :1]).any(2)).any():
        row, block = differ.nonzero()[0].tolist()
        raise CheckpointError(
            f"{where} has several scales in row {row}, columns {BLOCK * block} to {BLOCK * (block + 1) - 1}, "
            f"expected one: group_size is {k // scales.shape[1]}, TQ types hold multiples of {BLOCK}, "
            "'row' and 'tensor'"
        )
    d = by_block[..., 0]
    if torch.equal(d.half().to(d.dtype), d):
        return d.half(), None
    if scales.numel() > 1:
        raise CheckpointError(
            f"{where} has {scales.dtype} scales that float16 does not hold, expected scale_dtype float16 "
            "or group_size 'tensor'"
        )
    return torch.ones_like(d, dtype=torch.float16), scales.float().flatten()


def _encode_ternary(codes: Tensor, d: Tensor, kind: str) -> np.ndarray:
    """codes [n, k / 4], d fp16 [n or 1, k / 256] -> bytes [n, blocks of bytes]."""
    from gguf import GGMLQuantizationType, quants

    ternary = torch.ops.ternary.unpack(codes).numpy().astype(np.float32)
    data = quants.quantize(ternary, GGMLQuantizationType[kind.upper()])
    blocks = data.reshape(len(data), ternary.shape[1] // BLOCK, -1)
    blocks[..., -2:] = d.contiguous().numpy()[..., None].view(np.uint8)  # also where all codes are 0
    return blocks.reshape(len(data), -1)


def _encode_int8(where: str, rows: Tensor, scales: Tensor) -> np.ndarray:
    """rows [v, d], scales [v, 1] -> Q8_0: blocks of an fp16 scale and 32 weights."""
    half = scales.half()
    if rows.shape[1] % 32 or not torch.equal(half.to(scales.dtype), scales):
        found = f"{rows.shape[1]} columns and {scales.dtype} scales"
        raise CheckpointError(
            f"{where}: Q8_0 wants a multiple of 32 columns and float16 scales, found {found}"
        )
    v, blocks = len(rows), rows.shape[1] // 32
    d = half.view(torch.uint8)[:, None].expand(v, blocks, 2)
    data = torch.cat([d, rows.view(torch.uint8).unflatten(1, (blocks, 32))], dim=2)
    return data.flatten(1).numpy()
