"""The teacher's logits on disk, so that it runs once: the k largest of each token, the rest as one class."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import distributed
from .data import DataError

_FLUSH = 64  # batches between two waits for the disk
_LEAST = -60000.0  # in place of log 0, within float16


class TeacherCache:
    """Memory-mapped arrays over the windows of a token stream, each window written once.

    ids [n, l, k] of the largest logits, log_p fp16 [n, l, k] of them and rest fp32 [n, l] of all others
    together: logarithms of probabilities at the run's temperature. done uint8 [n].
    """

    def __init__(self, directory: Path, identity: dict[str, Any], windows: int, length: int, k: int) -> None:
        """Opens it, or makes an empty one. All ranks must call it.

        identity: all that the contents depend on, with "vocabulary", its size; DataError on another's.
        """
        vocabulary = identity["vocabulary"]
        if not 0 < k < vocabulary:
            raise ValueError(f"teacher_top_k is {k}, expected 1 to {vocabulary - 1}")
        ids = np.uint16 if vocabulary <= 1 << 16 else np.uint32
        arrays = {
            "ids": (ids, (windows, length, k)),
            "log_p": (np.float16, (windows, length, k)),
            "rest": (np.float32, (windows, length)),
            "done": (np.uint8, (windows,)),
        }
        identity = identity | {"windows": windows, "length": length, "k": k}

        def make() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            about = directory / "cache.json"
            if about.is_file():
                found = json.loads(about.read_text())
                if changed := [key for key in identity if found.get(key) != identity[key]]:
                    text = "; ".join(f"{key} was {found.get(key)}, is {identity[key]}" for key in changed)
                    raise DataError(f"{directory} is a cache of something else: {text}")
                return
            for name, (dtype, shape) in arrays.items():  # sparse files: they fill as they are written
                open_memmap(directory / f"{name}.npy", "w+", dtype, shape).flush()
            temporary = directory / "cache.tmp"
            temporary.write_text(json.dumps(identity))
            temporary.replace(about)  # last: without it all is made anew

        distributed.first(make)
        opened = (open_memmap(directory / f"{name}.npy", "r+") for name in arrays)
        self.ids, self.log_p, self.rest, self.done = opened
        self.k = k

    def fill(
        self,
        windows: Iterable[int],
        batch_size: int,
        teacher: Callable[[list[int]], Tensor],
        head: Tensor,
        temperature: float,
        progress: Callable[[int], Any] = lambda done: None,
    ) -> None:
        """Writes those of the windows that are missing, each rank its share; goes on where a kill left it.

        teacher: windows [b] -> hidden states [b, l, d]. progress is told of windows written.
        """
        missing = [w for w in sorted(set(windows)) if not self.done[w]]
        distributed.first(lambda: None)  # all have looked before one writes
        mine = missing[distributed.rank() :: distributed.world()]
        unflushed: list[int] = []
        for begin in range(0, len(mine), batch_size):
            batch = mine[begin : begin + batch_size]
            hidden = teacher(batch)
            for w, row in zip(batch, hidden, strict=True):
                log_p, ids, rest = top_k(F.linear(row, head), self.k, temperature)
                self.log_p[w], self.ids[w], self.rest[w] = (v.cpu().numpy() for v in (log_p, ids, rest))
            unflushed += batch
            if len(unflushed) >= _FLUSH * batch_size or begin + batch_size >= len(mine):
                for array in (self.ids, self.log_p, self.rest):
                    array.flush()
                self.done[unflushed] = 1  # behind what it vouches for
                self.done.flush()
                unflushed = []
            progress(len(batch))
        distributed.first(lambda: None)

    def read(self, windows: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """log p fp32 [b, l, k + 1], the rest last and normalized anew, and ids int64 [b, l, k]."""
        values = np.concatenate([self.log_p[windows], self.rest[windows][..., None]], -1, dtype=np.float32)
        log_p = torch.from_numpy(values).to(device).log_softmax(-1)
        return log_p, torch.from_numpy(self.ids[windows].astype(np.int64)).to(device)


def top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """logits [l, v] -> log p of the k largest (fp16 [l, k]), their ids, log p of the rest together [l]."""
    log_p = (logits.float() / temperature).log_softmax(-1)
    largest, ids = log_p.topk(k)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1).clamp(min=_LEAST)
    return largest.clamp(min=_LEAST).half(), ids, rest


def top_k_loss(
    hidden: Tensor,
    head: Tensor,
    log_p: Tensor,
    ids: Tensor,
    labels: Tensor,
    kl_weight: float,
    temperature: float,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, KL, CE) as distillation_loss, KL over the k + 1 classes of the cache: at most that over all.

    hidden [..., d], head [v, d], log_p [..., k + 1], ids [..., k], labels [...]. Logits of `chunk` positions
    are held at a time, and computed again for the gradient.
    """
    hidden, log_p, ids, labels = (
        hidden.flatten(0, -2),
        log_p.flatten(0, -2),
        ids.flatten(0, -2),
        labels.flatten(),
    )
    acc = torch.promote_types(hidden.dtype, torch.float32)

    def sums(x: Tensor, head: Tensor, log_t: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(x, head).to(acc)
        log_s = (logits / temperature).log_softmax(-1)
        rest = log_s.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        log_s = torch.cat([log_s.gather(-1, ids), rest], -1)
        kl = (log_t.exp() * (log_t - log_s)).sum()
        return torch.stack([kl, F.cross_entropy(logits, labels, reduction="sum")])

    total = torch.zeros(2, dtype=acc, device=hidden.device)
    for parts in zip(*(v.split(chunk) for v in (hidden, log_p, ids, labels)), strict=True):
        total = total + checkpoint(
            sums, parts[0], head, *parts[1:], use_reentrant=False, preserve_rng_state=False
        )
    kl, ce = total / len(labels)
    return kl_weight * temperature**2 * kl + (1 - kl_weight) * ce, kl.detach(), ce.detach()
