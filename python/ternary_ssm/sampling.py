"""How the next token is chosen: SamplingConfig says it, Sampler does it on the model's device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen, and which one ends a row. Raises ValueError on what makes no sense.

    The steps and their order are transformers': penalty, temperature, top-k, top-p, min-p.

    temperature: what the logits are divided by; 0 takes the likeliest token, whatever the filters.
    top_k: sample among the k likeliest tokens; none: among all.
    top_p: among the likeliest tokens that together reach this probability.
    min_p: among tokens at least this share as likely as the likeliest.
    repetition_penalty: divides (negative: multiplies) the logit of each token of the prompt or the text so
        far (CTRL, arXiv 1909.05858, 4.1).
    seed: row i draws from a generator of its own, seeded with seed + i; none: from torch's default generator.
    eos_token_id: the token, or any of the tokens, that ends a row; none: the model's; () for no such token.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        # Below 1e-6 fp32 quotients overflow.
        check("temperature", self.temperature, lambda t: t == 0 or 1e-6 <= t < math.inf, "0 or at least 1e-6")
        if self.top_k is not None:
            check("top_k", self.top_k, lambda k: k >= 1, "an integer from 1, or None", Integral)
        check("top_p", self.top_p, lambda p: 0 < p <= 1, "more than 0 and at most 1")
        check("min_p", self.min_p, lambda p: 0 <= p <= 1, "0 to 1")
        check("repetition_penalty", self.repetition_penalty, lambda p: 0 < p < math.inf, "a positive number")
        if self.seed is not None:
            check("seed", self.seed, lambda s: 0 <= s < 2**63, "an integer from 0 to 2^63 - 1", Integral)
        eos = self.eos_token_id
        for token in () if eos is None else (eos,) if isinstance(eos, Integral) else eos:
            check("eos_token_id", token, lambda t: t >= 0, "token ids from 0", Integral)


class Sampler:
    """Chooses a batch's next tokens by static buffers, so that a CUDA graph can hold it.

    Random numbers come from the CPU, one a token, so that a seed draws alike on every device.
    """

    BLOCK = 256  # steps whose random numbers are drawn and uploaded at once

    def __init__(
        self, config: SamplingConfig, batch: int, vocab_size: int, device: torch.device | str
    ) -> None:
        self.config, self.vocab_size = config, vocab_size
        self.generators: list[torch.Generator] = []
        self.uniform = self.seen = None
        if config.temperature > 0:
            self.uniform = torch.empty(self.BLOCK, batch, 1, dtype=torch.float64, device=device)
        if config.repetition_penalty != 1:
            self.seen = torch.empty(batch, vocab_size, dtype=torch.bool, device=device)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, by the logits as they are."""
        return self.uniform is None and self.seen is None

    def start(self, prompts: Sequence[Sequence[int]], seed: int | None) -> None:
        """Begins new rows."""
        if self.uniform is not None:
            first = torch.randint(2**62, ()).item() if seed is None else int(seed)
            seeds = range(first, first + len(prompts))
            self.generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        if self.seen is not None:
            seen = torch.zeros(self.seen.shape, dtype=torch.bool)
            for row, prompt in zip(seen, prompts, strict=True):
                row[prompt] = True
            put(self.seen, seen)

    def draw(self, step: int) -> None:
        """To be called before each step, by its number from 0."""
        if self.uniform is not None and step % self.BLOCK == 0:
            draws = [torch.rand(self.BLOCK, generator=g, dtype=torch.float64) for g in self.generators]
            put(self.uniform, torch.stack(draws, dim=1).unsqueeze(-1))

    def __call__(self, logits: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """logits [b, padded vocabulary], step int64 [1] -> tokens [b], finite bool [b]."""
        scores = logits[:, : self.vocab_size].float()  # rows of padding are no tokens
        if self.seen is not None:
            penalty = self.config.repetition_penalty
            penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(self.seen, penalized, scores)
        high, tokens = scores.max(-1)
        finite = high - scores.amin(-1) < math.inf  # false for NaN too
        if self.uniform is not None:
            tokens = self._sample(scores, high.unsqueeze(-1), step)
        if self.seen is not None:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)
        return tokens, finite

    def _sample(self, scores: Tensor, high: Tensor, step: Tensor) -> Tensor:
        """Inverts the cumulated distribution at a uniform random number."""
        c = self.config
        scores = filter_scores((scores - high) / c.temperature, c.top_k, c.top_p, c.min_p)
        total = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        point = self.uniform.index_select(0, step % self.BLOCK).squeeze(0) * total[:, -1:]
        tokens = torch.searchsorted(total, point, right=True).squeeze(1)  # the first whose total is above
        return tokens.clamp(max=self.vocab_size - 1)  # NaN scores have none


def filter_scores(scores: Tensor, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """scores [b, v] -> the same, -inf where a token is not to be sampled. Equals of a kept one are kept."""
    likeliest = scores.amax(-1, keepdim=True)
    floor = torch.full_like(likeliest, -math.inf)
    if top_k is not None or top_p < 1:
        ranked = scores.topk(min(top_k or scores.shape[-1], scores.shape[-1])).values  # [b, k], falling
        floor = ranked[:, -1:]
    if top_p < 1:
        probs = (ranked - scores.masked_fill(scores < floor, -math.inf).logsumexp(-1, keepdim=True)).exp()
        before = probs.cumsum(-1) - probs  # of the tokens ahead in rank
        last = (before < top_p).sum(-1, keepdim=True) - 1
        floor = ranked.gather(-1, last.clamp(min=0))
    if min_p > 0:
        floor = torch.maximum(floor, likeliest + math.log(min_p))
    return scores.masked_fill(scores < floor, -math.inf)


def put(target: Tensor, values: Tensor) -> None:
    """Copies values of the host, for whose arrival nothing waits."""
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)


def check(name: str, value: Any, good: Callable[[Any], bool], expected: str, kind: type = Real) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not good(value):
        raise ValueError(f"{name} is {value!r}, expected {expected}")
