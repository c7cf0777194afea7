"""Files of tensors: safetensors and PyTorch's pickles, mapped, and saves that may be interrupted."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# In the order in which transformers looks for them.
WEIGHTS = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
STAGING = ".saving"  # inside the directory, hence on its file system: only there is a rename atomic
MAX_JSON = 64 << 20  # bytes; the index of the largest published model has 10 MB
DTYPES = {torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written: the file or tensor, what was expected, what was found."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever a parser raises on broken bytes into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise CheckpointError(f"{path}: {kind}{error}") from error


def read_json(path: Path) -> dict[str, Any]:
    with reading(path):
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file{_interrupted(path.parent)}")
        if (size := path.stat().st_size) > MAX_JSON:
            raise CheckpointError(f"{path}: {size} bytes, expected JSON of at most {MAX_JSON}")
        values = json.loads(path.read_bytes(), object_hook=_special_float)
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: holds a {type(values).__name__}, expected a JSON object")
        return values


def _special_float(values: dict[str, Any]) -> Any:
    """transformers 5 writes an infinity as {"__float__": "Infinity"}; older ones as Infinity."""
    return float(values["__float__"]) if values.keys() == {"__float__"} else values


def _interrupted(directory: Path) -> str:
    staging = directory / STAGING
    return f"; {staging} holds what an interrupted save had not put in place" if staging.is_dir() else ""


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of a directory by name, mapped from their files: nothing is read before it is used."""
    tensors = {}
    for path, names in _weight_files(directory).items():
        with reading(path):
            stored = _map_tensors(path)
            for name in stored if names is None else names:
                if name not in stored:
                    raise CheckpointError(f"{path}: has no tensor {name}, which the index expects there")
                tensors[name] = _plain(path, name, stored[name])
    return tensors


def _weight_files(directory: Path) -> dict[Path, list[str] | None]:
    """The files that hold the weights, each with the tensors wanted from it, None for all."""
    for name in WEIGHTS:
        path = directory / name
        if path.is_file():
            return _read_index(path) if name.endswith(".json") else {path: None}
    raise CheckpointError(
        f"{directory}: no weights, expected {' or '.join(WEIGHTS)}{_interrupted(directory)}"
    )


def _read_index(path: Path) -> dict[Path, list[str] | None]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is {type(weight_map).__name__}, expected tensor: file")
    files: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        # A plain name: an index may not reach outside its directory.
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\:\0"):
            raise CheckpointError(f"{path}: {name} is in {file!r}, expected the name of a file beside it")
        files.setdefault(path.parent / file, []).append(name)
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file, expected {len(files[file])} tensors by {path}")
    return files


def _map_tensors(path: Path) -> dict[str, Any]:
    if path.suffix != ".bin":
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # before PyTorch 1.6 it was not, and cannot be mapped
    values = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, expected a dict of tensors by name")
    return values


def _plain(path: Path, name: Any, tensor: Any) -> Tensor:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise CheckpointError(f"{path}: {name!r} is a {type(tensor).__name__}, expected tensors by name")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
        expected = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in DTYPES))
        raise CheckpointError(
            f"{path}: {name} is a {tensor.layout} {tensor.dtype} tensor on {tensor.device}, "
            f"expected a strided tensor of {expected}"
        )
    return tensor.detach().contiguous()


def write(
    directory: Path,
    tensors: Mapping[str, Tensor],
    documents: Mapping[str, str],
    copies: list[Path],
    max_shard_bytes: int,
) -> None:
    """Writes tensors, small files (name -> text; config.json is one) and copies of files into `directory`.

    Everything is first written and synced in a staging folder, then renamed into place, so that at any moment
    `directory` is the old checkpoint, the new one, or one without config.json, which nothing loads. The last
    happens only if a small file changes. Files that are not replaced stay.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file, expected a directory")
    staging = directory / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        weights = _stage_weights(staging, tensors, max_shard_bytes)
        for path in copies:
            shutil.copyfile(path, staging / path.name)
        for name, text in documents.items():
            (staging / name).write_text(text, encoding="utf-8")
        for path in staging.iterdir():
            shutil.copymode(staging / "config.json", path)  # safetensors makes files that others cannot read
            sync(path)
        small = [path.name for path in staging.iterdir() if path.name not in weights]
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _commit(directory, weights, sorted(small, key="config.json".__eq__))
    shutil.rmtree(staging, ignore_errors=True)


def _stage_weights(staging: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[str]:
    """Writes the weights' files and returns their names: the one that makes the others valid comes last."""
    shards: list[dict[str, Tensor]] = [{}]
    free = max_shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > free:
            shards.append({})
            free = max_shard_bytes
        shards[-1][name] = tensor.detach().contiguous()
        free -= tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], staging / SINGLE, metadata={"format": "pt"})
        return [SINGLE]
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if any((staging.parent / name).exists() for name in names):  # new names leave the old shards whole
        names = [name.replace("model", f"model-{secrets.token_hex(4)}") for name in names]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, staging / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, INDEX]


def _commit(directory: Path, weights: list[str], small: list[str]) -> None:
    """Moves staged files into place. SINGLE goes before INDEX: one rename or removal swaps the weights."""
    staging, stale = directory / STAGING, set()
    if (directory / INDEX).is_file():
        stale.add(INDEX)
        with suppress(CheckpointError):  # a broken one is being replaced
            stale |= {path.name for path in _read_index(directory / INDEX) if path.suffix == ".safetensors"}
    if INDEX in weights:
        stale.add(SINGLE)
    if any(not _same(staging / name, directory / name) for name in small):
        _move(directory / "config.json", staging / "config.json.old")
    for name in weights:
        _move(staging / name, directory / name)
    for name in stale - set(weights):
        (directory / name).unlink(missing_ok=True)
        sync(directory)
    for name in small:
        _move(staging / name, directory / name)


def _same(a: Path, b: Path) -> bool:
    return b.is_file() and a.read_bytes() == b.read_bytes()


def _move(source: Path, target: Path) -> None:
    if source.exists():
        os.replace(source, target)
        sync(target.parent)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
