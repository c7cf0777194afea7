"""Reading GGUF: a parser that trusts no size, offset or code of a file, and what its keys and blocks mean."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import MambaConfig, TernaryConfig
from .files import CheckpointError, reading
from .gguf import BLOCK, names_of

Q8_0, TQ1_0, TQ2_0 = 8, 34, 35
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
BLOCKS = {0: (1, 4), 1: (1, 2), 30: (1, 2)}  # type -> weights and bytes of a block
BLOCKS |= {Q8_0: (32, 34), TQ1_0: (BLOCK, 54), TQ2_0: (BLOCK, 66)}
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, FLOAT32 = 8, 9, 6
TABLES = {"backbone.embeddings.weight", "lm_head.weight"}


def read(path: Path) -> tuple[MambaConfig, TernaryConfig | None, dict[str, Tensor]]:
    """(config, ternary config, tensors under this package's names). Plain tensors are mapped.

    The scales of TQ blocks become one a tensor or a row where they agree, else one for 256 weights.
    """
    with reading(path):
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        keys, stored = _Parser(path).parse()
        if (table := stored.get("token_embd.weight")) is None:
            raise CheckpointError(f"{path}: no tensor token_embd.weight")
        config = _config(keys, table[1][0], "output.weight" not in stored)
        names = names_of(config.is_mamba2, min(config.n_layer, len(stored)))
        factors = {key: stored.pop(key) for key in [*stored] if key.endswith(".scale")}
        if strange := sorted(stored.keys() - names):
            raise CheckpointError(f"{path}: unexpected tensors {', '.join(strange[:4])}")
        tensors, packed = {}, {}
        for key, (kind, shape, data) in stored.items():
            name = names[key]
            if kind in PLAIN:
                plain = data.view(PLAIN[kind]).view(shape)
                tensors[name] = _our_tensor(path, name, plain, config.is_mamba2)
                continue
            blocks = data.view(*shape[:-1], -1, BLOCKS[kind][1])
            if blocks.dim() != 3:
                raise CheckpointError(f"{path}: {key} is {shape}, expected two dimensions")
            if kind == Q8_0:
                packed[name] = _decode_int8(path, name, blocks)
            else:
                factor = factors.pop(key.removesuffix("weight") + "scale", None)
                packed[name] = _decode_ternary(path, name, blocks, factor)
        if factors:
            raise CheckpointError(f"{path}: {', '.join(sorted(factors)[:4])} belongs to no ternary weight")
        ternary = _ternary_config(path, packed, {*tensors, *packed}) if packed else None
        for name, (weight, scale) in packed.items():
            tensors |= {name: weight, f"{name}_scale": scale}
    return config, ternary, tensors


class _Parser:
    """Walks through a header; what it allocates is bounded by the file's size."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        with open(path, "rb") as file:
            # Copy on write: PyTorch wants memory that it may write to.
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def parse(self) -> tuple[dict[str, Any], dict[str, tuple[int, list[int], Tensor]]]:
        """keys (arrays are None), and tensors by name: (type, shape, bytes)."""
        magic, version, n_tensors, n_keys = self._take("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise self._error(f"starts with {magic!r}, version {version}, expected b'GGUF', version 2 or 3")
        keys: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string()
            if key in keys:
                raise self._error(f"has the key {key!r} twice")
            keys[key] = self._value(*self._take("I"))
        infos: dict[str, tuple[list[int], int, int]] = {}
        for _ in range(n_tensors):
            name, (dims,) = self._string(), self._take("I")
            if name in infos or not 1 <= dims <= 4:
                raise self._error(f"{name} has {dims} dimensions or is there twice, expected 1 to 4, once")
            infos[name] = ([*self._take(f"{dims}Q")][::-1], *self._take("IQ"))
        alignment = keys.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment % 8:
            raise self._error(f"general.alignment is {alignment!r}, expected a multiple of 8")
        start = -(-self.at // alignment) * alignment
        return keys, {name: self._tensor(name, start, *info) for name, info in infos.items()}

    def _tensor(self, name: str, start: int, shape: list[int], kind: int, offset: int):
        if kind not in BLOCKS:
            raise self._error(f"{name} is of type {kind}, expected F32, F16, BF16, TQ1_0, TQ2_0 or Q8_0")
        weights, size = BLOCKS[kind]
        count = 1
        for n in shape:
            count *= n
        length, begin = count // weights * size, start + offset
        if not count or shape[-1] % weights or offset % 8 or begin + length > len(self.data):
            raise self._error(
                f"{name} has shape {shape} in blocks of {weights}, bytes {begin} to {begin + length}, "
                f"expected whole blocks at a multiple of 8 within {len(self.data)} bytes"
            )
        return kind, shape, torch.frombuffer(self.data, dtype=torch.uint8, count=length, offset=begin)

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:  # tokens and merges: this package reads them in tokenizer.json
            inner, count = self._take("IQ")
            if inner == STRING:
                for _ in range(count):
                    self._skip(*self._take("Q"))
            else:
                self._skip(count * struct.calcsize(self._format(inner)))
            return None
        (value,) = self._take(self._format(kind))
        return float(str(np.float32(value))) if kind == FLOAT32 else value  # 1e-5, not 9.99...e-6

    def _format(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self._error(
                f"byte {self.at} follows a value of type {kind}, expected 0 to 12, no nested array"
            )
        return SCALARS[kind]

    def _string(self) -> str:
        (length,) = self._take("Q")
        begin = self.at
        self._skip(length)
        return self.data[begin : self.at].decode()

    def _take(self, layout: str) -> tuple[Any, ...]:
        begin = self.at
        self._skip(struct.calcsize(f"<{layout}"))
        return struct.unpack_from(f"<{layout}", self.data, begin)

    def _skip(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise self._error(f"ends at byte {len(self.data)}, expected {size} bytes from {self.at} on")
        self.at += size

    def _error(self, words: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {words}")


def _config(keys: Mapping[str, Any], rows: int, tied: bool) -> MambaConfig:
    arch = keys.get("general.architecture")
    if arch not in ("mamba", "mamba2"):
        raise ValueError(f"general.architecture is {arch!r}, expected 'mamba' or 'mamba2'")

    def size(name: str) -> int:
        if type(value := keys.get(f"{arch}.{name}")) is not int or value <= 0:
            raise ValueError(f"{arch}.{name} is {value!r}, expected a positive integer")
        return value

    if keys.get(f"{arch}.ssm.dt_b_c_rms"):
        raise ValueError(f"{arch}.ssm.dt_b_c_rms is true (FalconMamba), expected false")
    d_model, d_inner, rank = size("embedding_length"), size("ssm.inner_size"), size("ssm.time_step_rank")
    cfg: dict[str, Any] = {"d_state": size("ssm.state_size"), "d_conv": size("ssm.conv_kernel")}
    cfg["expand"] = d_inner / d_model if d_inner % d_model else d_inner // d_model
    if arch == "mamba2":
        if d_inner % rank:
            raise ValueError(f"{arch}.ssm.inner_size is {d_inner}, expected a multiple of the {rank} heads")
        cfg = {"layer": "Mamba2"} | cfg | {"headdim": d_inner // rank, "ngroups": size("ssm.group_count")}
    else:
        cfg = {"layer": "Mamba1"} | cfg | {"dt_rank": rank}
    vocab_size = size("vocab_size") if f"{arch}.vocab_size" in keys else rows
    tokens = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return MambaConfig(
        d_model=d_model,
        n_layer=size("block_count"),
        ssm_cfg=cfg,
        vocab_size=vocab_size,
        pad_vocab_size_multiple=1 if vocab_size == rows else rows,
        tie_embeddings=tied,
        norm_epsilon=keys.get(f"{arch}.attention.layer_norm_rms_epsilon"),
        **{ours: keys.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in tokens.items()},
    )


def _our_tensor(path: Path, name: str, tensor: Tensor, is_mamba2: bool) -> Tensor:
    if name.endswith("conv1d.weight"):
        return tensor.unsqueeze(1)
    if name.endswith((".D", "mixer.norm.weight")):
        return tensor.flatten()
    if not name.endswith(".A_log"):
        return tensor
    A = tensor.float().flatten() if is_mamba2 else tensor.float()
    if not ((A < 0) & A.isfinite()).all():
        raise CheckpointError(f"{path}: {name} comes from values that are not below 0 and finite")
    log = (-A.double()).log().float()
    # Of the neighbours, that whose exponential is A again: with it the model computes what it did.
    for toward in (-torch.inf, torch.inf):
        other = log.nextafter(torch.tensor(toward))
        log = torch.where((other.exp() + A).abs() < (log.exp() + A).abs(), other, log)
    return log


def _decode_ternary(
    path: Path, name: str, blocks: Tensor, factor: tuple[int, list[int], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """blocks uint8 [n, k / 256, bytes] -> codes [n, k / 4], scales [n, k / 256]: fp16, fp32 with a factor."""
    if name.rpartition(".")[0].rpartition(".")[2] not in ("in_proj", "out_proj", "x_proj", "dt_proj"):
        raise CheckpointError(f"{path}: {name} is ternary, expected F32, F16 or BF16")
    if blocks.shape[-1] == BLOCKS[TQ2_0][1]:
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(1)
        fields = blocks[..., :64].unflatten(-1, (2, 1, 32)) >> shifts & 3
        if (fields == 3).any():
            raise CheckpointError(f"{path}: {name} has the code 3 in a TQ2_0 block, expected 0 to 2")
        fields = fields.flatten(2)
    else:
        parts = (blocks[..., :32], 5), (blocks[..., 32:48], 5), (blocks[..., 48:52], 4)
        fields = torch.cat([_trits(part, count) for part, count in parts], dim=-1)
    codes = torch.ops.ternary.pack((fields.to(torch.int8) - 1).flatten(1))
    scales = blocks[..., -2:].contiguous().view(torch.float16).squeeze(-1)
    if factor is not None:
        kind, shape, data = factor
        if kind != 0 or shape != [1]:
            raise CheckpointError(f"{path}: the scale of {name} is of type {kind}, {shape}, expected F32 [1]")
        scales = scales.float() * data.view(torch.float32)
    return codes, scales


def _trits(data: Tensor, count: int) -> Tensor:
    """The base-3 digits of bytes [..., m], a byte being digits / 3^5 of 256 -> [..., count * m]."""
    powers = torch.tensor([1, 3, 9, 27, 81][:count], dtype=torch.uint8).unsqueeze(1)
    fractions = data.unsqueeze(-2) * powers  # the product wraps: only the fraction is left
    return (fractions.short() * 3 >> 8).flatten(-2)


def _decode_int8(path: Path, name: str, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """blocks uint8 [v, d / 32, 34] -> rows int8 [v, d], scales fp16 [v, 1]."""
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    if name not in TABLES or (scales != scales[:, :1]).any():
        raise CheckpointError(
            f"{path}: {name} is Q8_0, expected of it only token tables with one scale a row"
        )
    return blocks[..., 2:].contiguous().view(torch.int8).flatten(1), scales[:, :1]


def _ternary_config(path: Path, packed: dict[str, tuple[Tensor, Tensor]], names: set[str]) -> TernaryConfig:
    """Merges the scales in `packed` in place as far as they agree, and says how."""
    linears = {name.removesuffix(".weight"): name for name in packed if name not in TABLES}
    tables = packed.keys() & TABLES
    if not linears or (tables and tables != names & TABLES):
        raise CheckpointError(
            f"{path}: {', '.join(tables)} is Q8_0, expected so only with all token tables and ternary layers"
        )
    scales = [packed[name][1] for name in linears.values()]
    group, rows, columns = BLOCK, None, None
    if all((s == s[:, :1]).all() for s in scales):
        group, columns = "row", 1
        if all((s == s[:1]).all() for s in scales):
            group, rows = "tensor", 1
    dtype = torch.float32 if any(s.dtype == torch.float32 for s in scales) else torch.float16
    for name, (weight, scale) in packed.items():
        if name not in TABLES:
            scale = scale[:rows, :columns]
        packed[name] = weight, scale.to(dtype).contiguous()
    kinds = sorted({name.rpartition(".")[2] for name in linears})
    selected = {name for name in names if name.removesuffix(".weight").rpartition(".")[2] in kinds}
    return TernaryConfig(
        group_size=group,
        scale_dtype=str(dtype).removeprefix("torch."),
        modules=tuple(kinds if selected == set(linears.values()) else sorted(linears)),
        embedding="int8" if tables else "float",
    )
