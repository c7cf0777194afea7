"""Checkpoints: a directory <-> (config, ternary config, tensors by name), in the layouts of two libraries;
and the files of a third, llama.cpp's GGUF.

A layout (transformers, mamba_ssm) is a module with matches(config.json), read(config.json) -> MambaConfig and
write(MambaConfig) -> config.json. Ternary models come in either, with quantization_config in config.json and
pairs X.weight, X.weight_scale in place of dense weights (docs/format.md).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import MambaConfig, TernaryConfig
from . import gguf, gguf_read, mamba_ssm, transformers
from .files import CheckpointError, read_json, read_tensors, reading, write

__all__ = ["Checkpoint", "CheckpointError", "assign", "gguf", "load", "reading", "save"]

EMBEDDING = "backbone.embeddings"
DYNAMICS = {"A_log", "D", "dt_bias"}  # float32 in memory, whatever a file holds
MAX_SIZE = 2**20  # of what is not seen in the embedding: no product of them overflows 64 bits
# What else in a model's directory belongs to the model.
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")
SIDE_FILES += ("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")


@dataclass(frozen=True)
class Checkpoint:
    """What a directory or GGUF file holds; the tensors, under this package's names, are mapped."""

    directory: Path  # or the GGUF file
    config: MambaConfig
    ternary: TernaryConfig | None
    tensors: dict[str, Tensor]

    @property
    def settings(self) -> Path:
        """The file that the config comes from."""
        return self.directory if _is_gguf(self.directory) else self.directory / "config.json"

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the dense weights, the widest where they differ."""
        names = [n for n in self.tensors if not n.endswith("_scale") and n.rpartition(".")[2] not in DYNAMICS]
        values = [t for t in map(self.tensors.__getitem__, names) if t.dtype.is_floating_point]
        if _is_gguf(self.directory):  # where all but matrices is float32 whatever the model was
            values = [t for t in values if t.dim() == 2]
        dense = {t.dtype for t in values}
        widest = reduce(torch.promote_types, dense) if dense else torch.float32
        return widest if widest.itemsize == 2 else torch.float32


def load(directory: str | Path) -> Checkpoint:
    """Opens a .gguf file, or a directory of transformers, mamba_ssm or this package by its config.json."""
    directory = Path(directory)
    if _is_gguf(directory):
        checkpoint = Checkpoint(directory, *gguf_read.read(directory))
    else:
        checkpoint = _load_directory(directory)
    _check_sizes(checkpoint)
    if checkpoint.config.tie_embeddings:
        _drop_tied_head(directory, checkpoint.tensors)
    return checkpoint


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and not path.is_dir()


def _load_directory(directory: Path) -> Checkpoint:
    path = directory / "config.json"
    values = read_json(path)
    layout = next((layout for layout in (transformers, mamba_ssm) if layout.matches(values)), None)
    if layout is None:
        raise CheckpointError(
            f"{path}: model_type is {values.get('model_type')!r} and there is no d_model, "
            "expected model_type 'mamba' or 'mamba2' (transformers) or d_model (mamba_ssm)"
        )
    with reading(path):
        config, ternary = layout.read(values), None
        if (quantization := values.get("quantization_config")) is not None:
            if not isinstance(quantization, dict) or "quant_method" not in quantization:
                raise ValueError(f"quantization_config is {quantization!r}, expected a quant_method in it")
            ternary = TernaryConfig.from_dict(quantization)
    return Checkpoint(directory, config, ternary, _our_names(directory, read_tensors(directory)))


def _our_names(directory: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {name.replace(f"{mamba_ssm.EMBEDDING}.", f"{EMBEDDING}."): t for name, t in tensors.items()}
    if len(ours) != len(tensors):
        raise CheckpointError(f"{directory}: has both {mamba_ssm.EMBEDDING} and {EMBEDDING}, expected one")
    return ours


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Refuses sizes so far from the tensors that it would take forever to build the model."""
    directory, config, tensors = checkpoint.directory, checkpoint.config, checkpoint.tensors
    settings = checkpoint.settings.name
    layers = {match[1] for name in tensors if (match := re.match(r"backbone\.layers\.(\d+)\.", name))}
    if len(layers) != config.n_layer:
        raise CheckpointError(
            f"{directory}: {len(layers)} layers in the weights, {config.n_layer} in {settings}"
        )
    if (table := tensors.get(f"{EMBEDDING}.weight")) is None:
        raise CheckpointError(f"{directory}: no tensor {EMBEDDING}.weight")
    packed = checkpoint.ternary is not None and checkpoint.ternary.embedding == "ternary"
    columns = config.d_model // 4 if packed else config.d_model
    if list(table.shape) != [config.padded_vocab_size, columns]:
        raise CheckpointError(
            f"{directory}: {EMBEDDING}.weight is {list(table.shape)}, {settings} expects "
            f"[{config.padded_vocab_size}, {columns}] (padded vocabulary, d_model{' / 4' * packed})"
        )
    mixer = {"d_state": config.d_state, "d_conv": config.d_conv, "expand": config["expand"]}
    mixer |= {"headdim": config.headdim} if config.is_mamba2 else {"dt_rank": config.dt_rank}
    for name, size in mixer.items():
        if size > MAX_SIZE:
            raise CheckpointError(f"{checkpoint.settings}: {name} is {size}, expected at most {MAX_SIZE}")


def _drop_tied_head(directory: Path, tensors: dict[str, Tensor]) -> None:
    """mamba_ssm writes a tied head a second time."""
    for name in [name for name in tensors if name.startswith("lm_head.")]:
        table, head = tensors.get(name.replace("lm_head", EMBEDDING)), tensors.pop(name)
        if table is None or not torch.equal(head, table):
            raise CheckpointError(
                f"{directory}: {name} is not {name.replace('lm_head', EMBEDDING)}, but config.json ties them"
            )


def assign(model: nn.Module, checkpoint: Checkpoint, device: torch.device | str) -> None:
    """Gives a model built on `meta` the checkpoint's tensors, moved to `device`.

    The model says what is expected: integers and scales exactly; other floats are cast to its dtypes.
    """
    where, tensors, wanted = checkpoint.directory, checkpoint.tensors, model.state_dict()
    missing, unexpected = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    if missing or unexpected:
        raise CheckpointError(f"{where}: missing tensors {_some(missing)}, unexpected {_some(unexpected)}")
    values = {}
    for name, want in wanted.items():
        tensor, is_scale = tensors[name], name.endswith(".weight_scale")
        if tensor.shape != want.shape:
            hint = f" ({checkpoint.ternary})" if checkpoint.ternary is not None else ""
            raise CheckpointError(
                f"{where}: {name} is {list(tensor.shape)}, expected {list(want.shape)}{hint}"
            )
        castable = want.is_floating_point() and tensor.is_floating_point() and not is_scale
        if tensor.dtype != want.dtype and not castable:
            raise CheckpointError(f"{where}: {name} is {tensor.dtype}, expected {want.dtype}")
        if want.dtype == torch.uint8:
            _check_codes(where, name, tensor)
        if is_scale and not _in_range(tensor):
            row = ((tensor >= 0) & tensor.isfinite()).all(1).tolist().index(False)
            raise CheckpointError(
                f"{where}: {name} has {tensor[row].tolist()} in row {row}, expected finite scales from 0"
            )
        values[name] = tensor.to(device, want.dtype)
    model.load_state_dict(values, assign=True)


def _in_range(scales: Tensor) -> bool:
    low, high = scales.aminmax()
    return low.item() >= 0 and high.item() < math.inf  # False for a NaN


def _check_codes(where: Path, name: str, codes: Tensor) -> None:
    """Bits 10 of a field stand for nothing (docs/format.md): a high bit needs its low one."""
    if (first := torch.ops.ternary.first_invalid(codes)) >= 0:
        row, column = divmod(first, 4 * codes.shape[1])
        raise CheckpointError(
            f"{where}: {name} has the code 10 in row {row}, column {column}, expected 00, 01 or 11"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4) or "none"


def save(
    directory: str | Path,
    config: MambaConfig,
    ternary: TernaryConfig | None,
    tensors: Mapping[str, Tensor],
    source: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json, generation_config.json and safetensors; an interruption destroys nothing.

    The layout is transformers' where it has words for the model, else mamba_ssm's.
    source: a model's directory whose tokenizer and generation settings come along.
    """
    if latent := [name for name in tensors if ".parametrizations." in name]:
        raise CheckpointError(
            f"{directory}: the model is in quantization-aware training ({_some(latent)}): "
            "pack_ it first, or save a checkpoint of the trainer"
        )
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise CheckpointError(f"{directory}: {_some(empty)} on the meta device, expected values")
    values = transformers.write(config)
    if values is None:
        values = mamba_ssm.write(config)
        tensors = {n.replace(f"{EMBEDDING}.", f"{mamba_ssm.EMBEDDING}."): t for n, t in tensors.items()}
    else:
        values["dtype"] = str(tensors["backbone.norm_f.weight"].dtype).removeprefix("torch.")
    if ternary is not None:
        values["quantization_config"] = ternary.to_dict()
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = {key: value for key, value in ids.items() if value is not None}
    copies = []
    if source is not None:
        if (path := source / "generation_config.json").is_file():
            generation |= read_json(path)
        copies = [source / name for name in SIDE_FILES if (source / name).is_file()]
    documents = {"config.json": values, "generation_config.json": generation}
    texts = {name: json.dumps(document, indent=2) + "\n" for name, document in documents.items()}
    write(Path(directory), tensors, texts, copies, max_shard_bytes)
