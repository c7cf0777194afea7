"""Token data: text, data sets and token files read into one array, and the windows that training draws."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from tokenizers import Tokenizer

_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_TEXT = (".txt", ".jsonl", ".parquet")
_SAVED = ("state.json", "dataset_dict.json")  # what datasets' save_to_disk leaves in a directory
_PIECE = 1 << 18  # characters of a .txt that one thread of the tokenizer gets
_BATCH = 1 << 22  # characters tokenized at a time: about 1 M tokens, some 100 MiB in the tokenizer
_SLICE = 1 << 24  # tokens of a memory-mapped file looked at at a time


class DataError(ValueError):
    """Data that cannot be trained or measured on: where, what was expected, what was found."""


def load_tokens(
    path: str | Path,
    vocab_size: int,
    tokenizer: str | Path | None = None,
    eos_token_id: int | None = None,
    limit: int | None = None,
) -> np.ndarray:
    """The token ids [n] of a file, uint16 if vocab_size is at most 65536, else uint32.

    path: .npy (any integers) or .bin (raw, little endian, of the dtype above), both memory-mapped;
        .txt (one document), .jsonl ({"text": ...} a line), both also compressed (.gz, .bz2, .xz), or .parquet
        (a column "text"); a directory of such text files, read in the order of their names, or one that
        datasets saved; "hf:NAME", "hf:NAME:SPLIT" or "hf:NAME:CONFIG:SPLIT", streamed from the hub.
    tokenizer: the tokenizer.json for text. eos_token_id follows each document (default: <|endoftext|>).
    limit: tokens to read of a streamed data set.
    Raises DataError on files that are missing, empty or damaged, and on ids outside the vocabulary.
    """
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    streamed, file = str(path).startswith("hf:"), Path(path)
    if streamed or file.is_dir():
        documents = _hub(str(path)) if streamed else _directory(file)
        tokens = _tokenize(documents, tokenizer, eos_token_id, limit if streamed else None)
    elif not file.is_file() or not file.stat().st_size:
        raise DataError(f"{path}: {'is empty' if file.is_file() else 'no such file'}")
    elif file.suffix in (".npy", ".bin"):
        tokens = _map(file, dtype)
    elif _kind(file) in _TEXT:
        tokens = _tokenize(_documents(file), tokenizer, eos_token_id)
    else:
        raise DataError(
            f"{path}: expected .npy, .bin, .txt, .jsonl (both also .gz, .bz2, .xz), .parquet or a directory"
        )
    if not len(tokens):
        raise DataError(f"{path}: holds no tokens")
    for start in range(0, len(tokens), _SLICE):
        piece = tokens[start : start + _SLICE]
        if piece.min() < 0 or piece.max() >= vocab_size:
            i = int(np.flatnonzero((piece < 0) | (piece >= vocab_size))[0])
            raise DataError(f"{path}: token {start + i} is {piece[i]}, expected 0 to {vocab_size - 1}")
    return tokens if isinstance(tokens, np.memmap) else tokens.astype(dtype)


def sequence_bounds(ids: torch.Tensor, ends: Iterable[int]) -> torch.Tensor:
    """cu_seqlens int32 [q + 1] of ids [b, l] laid end to end.

    A sequence ends with its row or behind a token of `ends`; a row may begin within a document.
    """
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, 0] = True
    begins[:, 1:] |= torch.isin(ids[:, :-1], torch.tensor(list(ends)))
    last = torch.tensor([ids.numel()])
    return torch.cat([begins.flatten().nonzero().flatten(), last]).int()


class TokenStream:
    """Batches of windows in an order that seed and step alone decide: any step can be asked for at any time.

    Window w predicts tokens [w l + 1, w l + l], so an epoch predicts each token once but for a rest shorter
    than l. Each epoch has its own order; batches run across the end of an epoch.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, batch_size: int, seed: int = 0) -> None:
        if len(tokens) <= sequence_length:
            raise DataError(f"{len(tokens)} tokens, expected at least {sequence_length + 1} for one window")
        self.tokens, self.sequence_length, self.batch_size = tokens, sequence_length, batch_size
        n = self.windows_per_epoch = (len(tokens) - 1) // sequence_length
        # RandomState is frozen by NumPy's policy: a run resumed under a later NumPy keeps its order.
        self._order = lru_cache(2)(lambda epoch: np.random.RandomState([seed, epoch]).permutation(n))

    def windows(self, step: int) -> list[int]:
        """The windows of a step's batch [b]."""
        first = step * self.batch_size
        places = (divmod(i, self.windows_per_epoch) for i in range(first, first + self.batch_size))
        return [int(self._order(epoch)[place]) for epoch, place in places]

    def batch(self, step: int) -> torch.Tensor:
        """The windows of a step."""
        return self.rows(self.windows(step))

    def rows(self, windows: list[int]) -> torch.Tensor:
        """int64 [b, l + 1]: inputs are [:, :-1], labels [:, 1:]."""
        l = self.sequence_length
        rows = [self.tokens[w * l : w * l + l + 1] for w in windows]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def fingerprint(self) -> str:
        """Names the tokens, whatever integer type they are stored in."""
        crc = 0
        for start in range(0, len(self.tokens), _SLICE):
            crc = zlib.crc32(self.tokens[start : start + _SLICE].astype("<u4"), crc)
        return f"{len(self.tokens)} tokens, crc32 {crc:08x}"


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        tokens = open_memmap(path, "r") if path.suffix == ".npy" else np.memmap(path, dtype, "r")
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a whole file of tokens, {dtype.name} if it is raw ({error})") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(f"{path}: expected integers [n], found {tokens.dtype} {list(tokens.shape)}")
    return tokens


def _tokenize(
    texts: Iterator[tuple[str, bool]], path: str | Path | None, eos: int | None, limit: int | None = None
) -> np.ndarray:
    """texts: (text, whether a document ends with it). Reads no more of them once it has `limit` tokens."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise DataError(f"text needs a tokenizer.json, {path} is none ({error})") from None
    if (eos := tokenizer.token_to_id("<|endoftext|>") if eos is None else eos) is None:
        raise DataError(f"{path}: no <|endoftext|>, and no eos_token_id was given to end documents with")
    tokenizer.no_truncation()  # a tokenizer.json may ask for either
    tokenizer.no_padding()
    arrays, batch, size, count = [np.empty(0, np.uint32)], [], 0, 0
    for item in chain(texts, [None]):  # None: encode what is left
        if item is not None:
            batch.append(item)
            size += len(item[0])
        if item is None or size >= _BATCH:
            encodings = tokenizer.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
            for (_, ends), encoding in zip(batch, encodings, strict=True):
                arrays.append(np.array(encoding.ids + [eos] * ends, np.uint32))
                count += len(arrays[-1])
            if limit is not None and count >= limit:
                break
            batch, size = [], 0
    return np.concatenate(arrays)[:limit]


def _kind(path: Path) -> str:
    """The suffix before that of an outer compression; parquet has its own."""
    inner = Path(path.stem).suffix
    return inner if path.suffix in _OPEN and inner != ".parquet" else path.suffix


def _documents(path: Path) -> Iterator[tuple[str, bool]]:
    kind = _kind(path)
    return _parquet(path) if kind == ".parquet" else _texts(path, kind)


def _directory(path: Path) -> Iterator[tuple[str, bool]]:
    """The documents of a directory: one saved by datasets (the split "train" of several), or text files."""
    if any((path / name).is_file() for name in _SAVED):
        load = _datasets(path).load_from_disk
        data = load(str(path))
        return _column(data["train"] if isinstance(data, dict) else data, path)
    files = sorted(file for file in path.iterdir() if _kind(file) in _TEXT)
    if not files:
        raise DataError(f"{path}: no such file, nor {', '.join(_TEXT)} or a saved data set in the directory")
    return chain.from_iterable(map(_documents, files))


def _hub(name: str) -> Iterator[tuple[str, bool]]:
    """hf:NAME[[:CONFIG]:SPLIT], a document at a time; the split is "train" by default."""
    _, repository, *rest = name.split(":")
    if not repository or len(rest) > 2:
        raise DataError(f"{name}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    config, split = rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"
    try:
        data = _datasets(name).load_dataset(repository, config, split=split, streaming=True)
    except (ValueError, LookupError, OSError) as error:  # those of the hub are among them
        raise DataError(f"{name}: cannot be read ({error})") from None
    return _column(data, name)


def _datasets(path: str | Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path}: needs datasets: pip install 'ternary-ssm[data]'") from None
    return datasets


def _column(rows: Iterable[dict], path: str | Path) -> Iterator[tuple[str, bool]]:
    for number, row in enumerate(rows):
        if not isinstance(text := row.get("text"), str):
            raise DataError(f'{path}, row {number}: expected a text in "text", found columns {sorted(row)}')
        yield text, True


def _parquet(path: Path) -> Iterator[tuple[str, bool]]:
    """A row group at a time."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path}: needs pyarrow: pip install 'ternary-ssm[data]'") from None
    try:
        with ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise DataError(f'{path}: expected a column "text", found {file.schema_arrow.names}')
            for batch in file.iter_batches(1024, columns=["text"]):
                yield from _column(batch.to_pylist(), path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _texts(path: Path, kind: str) -> Iterator[tuple[str, bool]]:
    """Documents of a .jsonl; pieces of a .txt, cut at ends of lines."""
    number, lines, size = 0, [], 0
    try:
        with _OPEN.get(path.suffix, open)(path, "rb") as file:
            for line in file:
                number += 1
                text = line.decode()
                if kind == ".jsonl":
                    if text.strip():
                        yield json.loads(text)["text"].encode().decode(), True  # refuses lone surrogates
                    continue
                if size >= _PIECE:
                    yield "".join(lines), False
                    lines, size = [], 0
                lines.append(text)
                size += len(text)
    except (UnicodeDecodeError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}, line {number}: cannot be read ({error})") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise DataError(f'{path}, line {number}: expected {{"text": "..."}}, found {text[:60]!r}') from None
    if lines:
        yield "".join(lines), True
