"""Text from a MambaLM: generate, stream, and TextStreamer for text as it comes."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from numbers import Integral
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import graphs
from .decoder import Decoder, next_logits
from .sampling import Sampler, SamplingConfig, check

if TYPE_CHECKING:
    from .models import MambaLM

Prompts = Tensor | Sequence[Sequence[int]]  # [b, l], or rows of any lengths
Steps = Iterator[list[int | None]]  # the tokens of each step

_decoders: WeakKeyDictionary[MambaLM, Decoder] = WeakKeyDictionary()  # of models on the CPU
_lock = threading.Lock()  # of that and of the stacking


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
    check("max_new_tokens", max_new_tokens, lambda n: n >= 0, "an integer from 0", Integral)
    return _decode(model, _prompts(model, prompts), max_new_tokens, config or SamplingConfig())


@torch.inference_mode()
def _decode(model: MambaLM, prompts: list[list[int]], max_new_tokens: int, config: SamplingConfig) -> Steps:
    if not prompts or not max_new_tokens:
        return
    eos = model.config.eos_token_id if config.eos_token_id is None else config.eos_token_id
    ends = {eos} if isinstance(eos, Integral) else set(eos or ())
    config = dataclasses.replace(config, eos_token_id=None)
    run = graphs.steps if model.device.type == "cuda" else _steps
    running = [True] * len(prompts)
    for step, chosen in enumerate(run(model, prompts, max_new_tokens, config)):
        if bad := [i for i, row in enumerate(running) if row and chosen[i] < 0]:
            raise RuntimeError(f"NaN or infinite logits at new token {step} of prompts {bad}")
        yield [token if row else None for token, row in zip(chosen, running, strict=True)]
        running = [row and token not in ends for token, row in zip(chosen, running, strict=True)]
        if not any(running):
            return


def _steps(
    model: MambaLM, prompts: list[list[int]], count: int, config: SamplingConfig
) -> Iterator[list[int]]:
    """The tokens [b] of each step; -1 where the logits are not finite."""
    ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=model.device)
    bounds = torch.tensor([*accumulate(map(len, prompts), initial=0)], dtype=torch.int32, device=model.device)
    cache = model.empty_cache(len(prompts))
    sampler = Sampler(config, len(prompts), model.config.vocab_size, model.device)
    sampler.start(prompts, config.seed)
    decoder = _decoder(model, len(prompts))
    logits = model(ids, cache, bounds, last_only=True).logits[:, 0]
    for step in range(count):
        sampler.draw(step)
        tokens, finite = sampler(logits, torch.tensor([step], device=model.device))
        yield torch.where(finite, tokens, -1).tolist()
        if step + 1 < count:  # ended rows go along: the batch keeps its shape
            logits = next_logits(model, decoder, tokens, cache)


def _decoder(model: MambaLM, batch: int) -> Decoder | None:
    """What takes the steps of so many rows, kept for the next call; None: the layers do."""
    if not Decoder.supports(model, batch):
        return None
    with _lock:
        if model in _decoders:
            _decoders[model].refresh()
        else:
            _decoders[model] = Decoder(model)
        return _decoders[model]


def release(model: MambaLM) -> None:
    """Forgets what is kept for a model: it knows the tensors by their addresses."""
    _decoders.pop(model, None)
    graphs.release(model)


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
