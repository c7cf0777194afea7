"""Text from a MambaLM: generate, stream, how they choose a token, and TextStreamer for text as it comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .models import MambaLM

Prompts = Tensor | Sequence[Sequence[int]]  # [b, l], or rows of any lengths
Steps = Iterator[list[int | None]]  # the tokens of each step


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
        _check(
            "temperature", self.temperature, lambda t: t == 0 or 1e-6 <= t < math.inf, "0 or at least 1e-6"
        )
        if self.top_k is not None:
            _check("top_k", self.top_k, lambda k: k >= 1, "an integer from 1, or None", Integral)
        _check("top_p", self.top_p, lambda p: 0 < p <= 1, "more than 0 and at most 1")
        _check("min_p", self.min_p, lambda p: 0 <= p <= 1, "0 to 1")
        _check("repetition_penalty", self.repetition_penalty, lambda p: 0 < p < math.inf, "a positive number")
        if self.seed is not None:
            _check("seed", self.seed, lambda s: 0 <= s < 2**63, "an integer from 0 to 2^63 - 1", Integral)
        eos = self.eos_token_id
        for token in () if eos is None else (eos,) if isinstance(eos, Integral) else eos:
            _check("eos_token_id", token, lambda t: t >= 0, "token ids from 0", Integral)


def generate(model: MambaLM, input_ids: Prompts, max_new_tokens: int, **sampling: Any) -> Prompts:
    """Continues each prompt by up to `max_new_tokens` tokens; the result has the prompt in front.

    input_ids: LongTensor [b, l] -> LongTensor [b, l + n], n the longest continuation; shorter ones are filled
        up with the model's pad_token_id, or with the token that ended them.
        Lists of token ids, of any lengths -> as many lists, not filled up.
    sampling: the fields of SamplingConfig, greedy by default. An ending token is part of the result.
    """
    prompts = _prompts(model, input_ids)
    rows = [list(prompt) for prompt in prompts]
    for tokens in stream(model, prompts, max_new_tokens, SamplingConfig(**sampling)):
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    if not isinstance(input_ids, Tensor):
        return rows
    longest, pad = max(map(len, rows), default=input_ids.shape[1]), model.config.pad_token_id
    rows = [row + [row[-1] if pad is None else pad] * (longest - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.int64, device=input_ids.device).reshape(len(rows), longest)


def stream(
    model: MambaLM, prompts: Prompts, max_new_tokens: int, config: SamplingConfig | None = None
) -> Steps:
    """Yields each step's new tokens, one a prompt; None for a row that has ended. Stops when all have.

    Raises ValueError on empty prompts and on ids outside the vocabulary, RuntimeError on NaN or infinite
    logits. Prompts run end to end without padding, so that no row depends on its neighbours.
    """
    _check("max_new_tokens", max_new_tokens, lambda n: n >= 0, "an integer from 0", Integral)
    return _decode(model, _prompts(model, prompts), max_new_tokens, config or SamplingConfig())


@torch.inference_mode()
def _decode(model: MambaLM, prompts: list[list[int]], max_new_tokens: int, config: SamplingConfig) -> Steps:
    if not prompts or not max_new_tokens:
        return
    eos = model.config.eos_token_id if config.eos_token_id is None else config.eos_token_id
    ends = {eos} if isinstance(eos, Integral) else set(eos or ())
    ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=model.device)
    bounds = torch.tensor([*accumulate(map(len, prompts), initial=0)], device=model.device)
    cache = model.empty_cache(len(prompts))
    choose = _Sampler(model, prompts, config)
    running = [True] * len(prompts)
    logits = model(ids, cache, bounds.int(), last_only=True).logits
    for step in range(max_new_tokens):
        tokens, finite = choose(logits[:, 0], step)
        chosen, good = torch.stack([tokens, finite.long()]).tolist()  # the step's one wait for the device
        if bad := [i for i, row in enumerate(running) if row and not good[i]]:
            raise RuntimeError(f"NaN or infinite logits at new token {step} of prompts {bad}")
        yield [token if row else None for token, row in zip(chosen, running, strict=True)]
        running = [row and token not in ends for token, row in zip(chosen, running, strict=True)]
        if not any(running) or step + 1 == max_new_tokens:
            return
        logits = model(tokens.unsqueeze(1), cache).logits  # ended rows go along: the batch keeps its shape


class _Sampler:
    """Chooses a batch's next tokens: logits [b, padded vocabulary], step -> tokens [b], finite bool [b].

    Random numbers come from the CPU, one a token, so that a seed draws alike on every device.
    """

    BLOCK = 256  # steps whose random numbers are drawn and uploaded at once

    def __init__(self, model: MambaLM, prompts: list[list[int]], config: SamplingConfig) -> None:
        self.config, self.vocab_size, self.device = config, model.config.vocab_size, model.device
        self.generators, self.seen = [], None
        if config.temperature > 0:
            first = torch.randint(2**62, ()).item() if config.seed is None else int(config.seed)
            seeds = range(first, first + len(prompts))
            self.generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        if config.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), self.vocab_size, dtype=torch.bool)
            for row, prompt in zip(self.seen, prompts, strict=True):
                row[prompt] = True
            self.seen = self.seen.to(self.device)

    def __call__(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        scores = logits[:, : self.vocab_size].float()  # rows of padding are no tokens
        if self.seen is not None:
            penalty = self.config.repetition_penalty
            penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(self.seen, penalized, scores)
        finite = scores.isfinite().all(-1)
        tokens = scores.argmax(-1) if self.config.temperature == 0 else self._sample(scores, step)
        if self.seen is not None:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)
        return tokens, finite

    def _sample(self, scores: Tensor, step: int) -> Tensor:
        """Inverts the cumulated distribution at a uniform random number."""
        if step % self.BLOCK == 0:
            draws = [torch.rand(self.BLOCK, generator=g, dtype=torch.float64) for g in self.generators]
            self.uniform = torch.stack(draws, dim=1).unsqueeze(-1).to(self.device)  # [BLOCK, b, 1]
        c = self.config
        scores = (scores - scores.amax(-1, keepdim=True)) / c.temperature
        scores = filter_scores(scores, c.top_k, c.top_p, c.min_p)
        total = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        point = self.uniform[step % self.BLOCK] * total[:, -1:]
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


class TextStreamer:
    """Turns one row's tokens into text as they come.

    decode: ids -> text, a Tokenizer's. stop: texts that end the row and are left out; `stopped` tells.
    Held back are bytes that do not yet make a character, and text that may be the start of a stop text.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise ValueError("a stop text is empty")
        self.decode, self.stop, self.stopped = decode, tuple(stop), False
        self._ids: list[int] = []  # the piece given out last, for decoders that look back, and what is new
        self._old, self._held = 0, ""  # how many of them were given out; text that was not

    def put(self, token: int) -> str:
        """The text that the token completes, often empty."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):  # U+FFFD: a character that lacks bytes
            return ""
        self._ids, self._old = self._ids[self._old :], len(self._ids) - self._old
        return self._release(text)

    def end(self) -> str:
        """What was held back, once no more tokens come."""
        text = self._release(self._new_text()) + self._held
        self._ids, self._old, self._held = [], 0, ""
        return text

    def _new_text(self) -> str:
        return self.decode(self._ids)[len(self.decode(self._ids[: self._old])) :]

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        # The stop text that is complete first, however the tokens cut the text; of two, the longer one.
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stop if stop in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max(
            (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _check(name: str, value: Any, good: Callable[[Any], bool], expected: str, kind: type = Real) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not good(value):
        raise ValueError(f"{name} is {value!r}, expected {expected}")


def _prompts(model: MambaLM, input_ids: Prompts) -> list[list[int]]:
    if isinstance(input_ids, Tensor):
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"input_ids is {input_ids.dtype} {[*input_ids.shape]}, expected int64 [b, l]")
        input_ids = input_ids.tolist()
    last = model.config.vocab_size - 1
    for i, prompt in enumerate(input_ids):
        if not isinstance(prompt, Sequence) or len(prompt) == 0:
            raise ValueError(f"prompt {i} is {prompt!r}, expected a list of at least one token id")
        for token in prompt:
            if not isinstance(token, Integral) or not 0 <= token <= last:
                raise ValueError(f"prompt {i} has the token id {token!r}, expected 0 to {last}")
    return [list(prompt) for prompt in input_ids]
