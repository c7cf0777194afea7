"""A MambaLM as a model of lm-evaluation-harness (pip install lm-eval)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from .generation import TextStreamer, stream
from .models import MambaLM
from .sampling import SamplingConfig

_CHUNK = 1024  # positions whose logits are held at once: 200 MiB in fp32 at 50 k entries

# What is scored: the two texts, their tokens.
Scored = tuple[tuple[str, str], list[int], list[int]]


class HarnessLM(TemplateLM):
    """For lm_eval.simple_evaluate(model=HarnessLM(model, tokenizer), tasks=[...]).

    Requests run end to end without padding, so that no result depends on its neighbours.
    batch_tokens: so many tokens at a time, at least one request. max_length: contexts lose their beginning so
    that context and continuation fit; texts for perplexity are cut into windows of it (2,048, as is usual).
    """

    def __init__(
        self, model: MambaLM, tokenizer: Tokenizer, batch_tokens: int = 16384, max_length: int = 2048
    ) -> None:
        super().__init__()
        for name, value in (("batch_tokens", batch_tokens), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        ends = model.config.end_ids
        self._eot = ends[0] if ends else tokenizer.token_to_id("<|endoftext|>")
        if self._eot is None:
            raise ValueError("the model has no eos_token_id and the tokenizer no <|endoftext|>, expected one")
        self.model, self._tokenizer = model.eval(), tokenizer
        self._batch_tokens, self._max_length = batch_tokens, max_length

    @property
    def eot_token_id(self) -> int:
        return self._eot

    @property
    def device(self) -> torch.device:
        return self.model.device

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)).ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, every token once."""
        texts = [request.args[0] for request in requests]
        windows: list[list[Scored]] = []
        for text in texts:
            pairs = get_rolling_token_windows(self.tok_encode(text), self._eot, self._max_length, 1)
            windows.append([(("", ""), *make_disjoint_window(pair)) for pair in pairs])
        flat = [window for of_text in windows for window in of_text]
        scores = iter(self._score(flat, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in of_text) for of_text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each context's continuation up to one of the texts in `until`, which is left out."""
        results = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generate_until"):
            context, options = request.args[0], dict(request.args[1])
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else [text for text in until if text]
            count = int(options.get("max_gen_toks", 256))
            if options.get("do_sample", options.get("temperature", 0) > 0):
                filters = {name: options[name] for name in ("top_k", "top_p") if options.get(name)}
                sampling = {"temperature": options.get("temperature", 1.0)} | filters
            else:
                sampling = {}
            config = SamplingConfig(**sampling, eos_token_id=self._eot)
            prompt = self.tok_encode(context)[-max(1, self._max_length - count) :] or [self._eot]
            streamer, text = TextStreamer(self._tokenizer.decode, until), ""
            for (token,) in stream(self.model, [prompt], count, config):
                if token == self._eot:
                    break
                text += streamer.put(token)
                if streamer.stopped:
                    break
            results.append(text + streamer.end())
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether greedy decoding would give it."""
        results = self._score(requests, disable_tqdm)
        for (texts, *_ids), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    @torch.inference_mode()
    def _score(self, requests: list[Scored], disable_tqdm: bool) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        inputs = [(context + after)[-self._max_length - 1 :] for _, context, after in requests]
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood") as bar:
            for batch in self._batches([len(tokens) - 1 for tokens in inputs]):
                bounds = [0, *accumulate(len(inputs[i]) - 1 for i in batch)]
                ids = torch.tensor([[token for i in batch for token in inputs[i][:-1]]], device=self.device)
                ends = torch.tensor(bounds, dtype=torch.int32, device=self.device)
                hidden = self.model.backbone(ids, None, ends)[0]
                counts = [min(len(requests[i][2]), len(inputs[i]) - 1) for i in batch]
                places = [p for n, end in zip(counts, bounds[1:], strict=True) for p in range(end - n, end)]
                labels = [token for n, i in zip(counts, batch, strict=True) for token in inputs[i][-n:] if n]
                log_p, greedy = self._predict(hidden[places], torch.tensor(labels, device=self.device))
                first = 0
                for i, n in zip(batch, counts, strict=True):
                    results[i] = (sum(log_p[first : first + n]), all(greedy[first : first + n]))
                    first += n
                bar.update(len(batch))
        return results

    def _predict(self, hidden: Tensor, labels: Tensor) -> tuple[list[float], list[bool]]:
        """hidden [n, d], labels [n] -> log p of each label, whether it is the likeliest token."""
        log_p, greedy, vocab = [], [], self.model.config.vocab_size
        for rows, label in zip(hidden.split(_CHUNK), labels.split(_CHUNK), strict=True):
            logits = self.model.logits(rows)[:, :vocab].float()
            log_p += logits.log_softmax(-1).gather(1, label.unsqueeze(1)).squeeze(1).double().tolist()
            greedy += (logits.argmax(-1) == label).tolist()
        return log_p, greedy

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """The longest first, so that memory runs out at once or not at all."""
        batch, tokens = [], 0
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batch and tokens + lengths[i] > self._batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(i)
            tokens += lengths[i]
        if batch:
            yield batch
