"""Token data: text, JSON lines and token files read into one array, and the windows that training draws."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from tokenizers import Tokenizer

_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_PIECE = 1 << 18  # characters of a .txt that one thread of the tokenizer gets
_BATCH = 1 << 22  # characters tokenized at a time: about 1 M tokens, some 100 MiB in the tokenizer
_SLICE = 1 << 24  # tokens of a memory-mapped file looked at at a time


class DataError(ValueError):
    """Data that cannot be trained or measured on: where, what was expected, what was found."""


def load_tokens(
    path: str | Path, vocab_size: int, tokenizer: str | Path | None = None, eos_token_id: int | None = None
) -> np.ndarray:
    """The token ids [n] of a file, uint16 if vocab_size is at most 65536, else uint32.

    path: .npy (any integers) or .bin (raw, little endian, of the dtype above), both memory-mapped;
        .txt (one document) or .jsonl ({"text": ...} a line), which may be compressed (.gz, .bz2, .xz).
    tokenizer: the tokenizer.json for text. eos_token_id follows each document (default: <|endoftext|>).
    Raises DataError on files that are missing, empty or damaged, and on ids outside the vocabulary.
    """
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        raise DataError(f"{path}: {'is empty' if path.is_file() else 'no such file'}")
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    kind = Path(path.stem).suffix if path.suffix in _OPEN else path.suffix
    if path.suffix in (".npy", ".bin"):
        tokens = _map(path, dtype)
    elif kind in (".txt", ".jsonl"):
        tokens = _tokenize(_texts(path, kind), tokenizer, eos_token_id)
    else:
        raise DataError(f"{path}: expected .npy, .bin, .txt or .jsonl (.txt and .jsonl also .gz, .bz2, .xz)")
    if not len(tokens):
        raise DataError(f"{path}: holds no tokens")
    for start in range(0, len(tokens), _SLICE):
        piece = tokens[start : start + _SLICE]
        if piece.min() < 0 or piece.max() >= vocab_size:
            i = int(np.flatnonzero((piece < 0) | (piece >= vocab_size))[0])
            raise DataError(f"{path}: token {start + i} is {piece[i]}, expected 0 to {vocab_size - 1}")
    return tokens if isinstance(tokens, np.memmap) else tokens.astype(dtype)


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
        """int64 [b, l + 1]: inputs are [:, :-1], labels [:, 1:]."""
        l = self.sequence_length
        rows = [self.tokens[w * l : w * l + l + 1] for w in self.windows(step)]
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


def _tokenize(texts: Iterator[tuple[str, bool]], path: str | Path | None, eos: int | None) -> np.ndarray:
    """texts: (text, whether a document ends with it)."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise DataError(f"text needs a tokenizer.json, {path} is none ({error})") from None
    if (eos := tokenizer.token_to_id("<|endoftext|>") if eos is None else eos) is None:
        raise DataError(f"{path}: no <|endoftext|>, and no eos_token_id was given to end documents with")
    tokenizer.no_truncation()  # a tokenizer.json may ask for either
    tokenizer.no_padding()
    arrays, batch, size = [np.empty(0, np.uint32)], [], 0
    for item in chain(texts, [None]):  # None: encode what is left
        if item is not None:
            batch.append(item)
            size += len(item[0])
        if item is None or size >= _BATCH:
            encodings = tokenizer.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
            for (_, ends), encoding in zip(batch, encodings, strict=True):
                arrays.append(np.array(encoding.ids + [eos] * ends, np.uint32))
            batch, size = [], 0
    return np.concatenate(arrays)


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
