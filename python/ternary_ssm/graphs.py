"""Generation on a GPU by CUDA graphs: one for a whole prefill, one for each token after it.

Tokens, states and random numbers stay on the device; the host looks at a block of tokens while the next one
runs. Graphs and their buffers are kept from call to call, as long as the model's tensors stay.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from .decoder import Decoder, Watch, last_logits, next_logits
from .ops import has_kernel
from .sampling import Sampler, SamplingConfig, put

if TYPE_CHECKING:
    from .models import MambaCache, MambaLM

BLOCK = 32  # tokens of a row between two looks of the host: 10 ms of a large model
BUCKETS = sorted(size << i for size in (16, 24) for i in range(8) if size << i <= 2048)  # tokens of a prefill
PREFILLS = 16  # shapes of prefills that are remembered
PREFILL_BYTES = 1 << 30  # what the states of a prefill in a graph may take
LOOPS, LOOP_BYTES = 16, 4 << 30  # decoding loops kept between calls, and what their states may take

_runners: WeakKeyDictionary[MambaLM, Runner] = WeakKeyDictionary()


def steps(
    model: MambaLM, prompts: list[list[int]], count: int, config: SamplingConfig
) -> Iterator[list[int]]:
    """The tokens [b] of each step; -1 where the logits are not finite."""
    runner = _runners.get(model)
    if runner is None or not runner.watch.unchanged():
        runner = _runners[model] = Runner(model)
    current = torch.cuda.current_stream(model.device)
    runner.stream.wait_stream(current)
    loop = runner.take(model, len(prompts), dataclasses.replace(config, seed=None))
    try:
        with runner.turn(model):
            loop.sampler.start(prompts, config.seed)
            logits = runner.prefill(model, prompts, loop.cache)
        blocks: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        begin, size = 0, 1
        while begin < count or blocks:
            if begin < count:
                size = min(size, count - begin)
                with runner.turn(model):
                    blocks.append(loop.launch(model, logits, begin, size))
                begin += size
                size = min(begin, BLOCK)  # 1, 1, 2, 4, ... 32: each block starts at a multiple of its size
            if begin in (1, count) or len(blocks) == 2:  # the first token is not kept waiting
                tokens, arrived = blocks.popleft()
                arrived.synchronize()
                yield from tokens.tolist()
    finally:
        runner.put_back(loop)
        current.wait_stream(runner.stream)


def release(model: MambaLM) -> None:
    """Forgets the graphs of a model."""
    _runners.pop(model, None)


class Pool:
    """The memory of a model's graphs. All are captured in one stream: cuBLAS keeps 32 MiB for each."""

    def __init__(self, device: torch.device) -> None:
        self.handle, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        torch.zeros(1, device=device)
        # Into a pool whose graphs are all gone torch captures no other.
        self.anchor = self.capture(lambda: torch.zeros(1, device=device))

    def capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what `function` launches. It must have run before: nothing is to be loaded or tuned."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            graph.capture_begin(self.handle, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        current.wait_stream(self.stream)
        return graph


class Runner:
    """The graphs of one model and what they share. All run in one stream, so that they can share memory."""

    def __init__(self, model: MambaLM) -> None:
        self.decoder = Decoder(model) if Decoder.supports(model, 1) else None  # moves tensors: first of all
        self.watch, self.place = Watch(model), _place(model)
        self.stream = torch.cuda.current_stream(model.device)
        self.pool = Pool(model.device)
        self.lock = threading.Lock()
        self.loops: list[Loop] = []  # idle ones, the last used at the end
        self.prefills: OrderedDict[tuple[int, int], Prefill | None] = OrderedDict()
        self.scratch: WeakValueDictionary[int, MambaCache] = WeakValueDictionary()
        scan = "ssd" if model.config.is_mamba2 else "selective_scan"
        self.captures_prefill = has_kernel("causal_conv1d", "cuda") and has_kernel(scan, "cuda")

    @contextmanager
    def turn(self, model: MambaLM) -> Iterator[None]:
        """The stream, for one caller at a time."""
        if _place(model) != self.place:
            raise RuntimeError("the model was moved or cast while it generated, expected it to stay")
        with self.lock, torch.cuda.stream(self.stream):
            yield

    def take(self, model: MambaLM, batch: int, config: SamplingConfig) -> Loop:
        """A loop that nobody else uses until it is put back."""
        with self.turn(model):
            if self.decoder is not None:
                self.decoder.update()
            for i, loop in enumerate(self.loops):
                if loop.key == (batch, config):
                    return self.loops.pop(i)
            return Loop(self, model, batch, config)

    def put_back(self, loop: Loop) -> None:
        with self.lock:
            self.loops.append(loop)
            while len(self.loops) > LOOPS or sum(loop.cache.ssm.nbytes for loop in self.loops) > LOOP_BYTES:
                self.loops.pop(0)

    def prefill(self, model: MambaLM, prompts: list[list[int]], cache: MambaCache) -> Tensor:
        """Reads the prompts into the cache; the logits [b, v] of their last tokens.

        Prompts of one bucket run at one size, replayed or not, so that a call's result is that of the first.
        """
        ids, bounds = [t for prompt in prompts for t in prompt], [*accumulate(map(len, prompts), initial=0)]
        bucket = next((size for size in BUCKETS if size >= len(ids)), None)
        if not self.captures_prefill or bucket is None or cache.ssm.nbytes > PREFILL_BYTES:
            return Prefill(self.decoder, len(ids), cache)(model, ids, bounds)
        rows = len(prompts) + 1  # the last sequence is the padding
        key = bucket, rows
        again = key in self.prefills
        prefill = self.prefills.pop(key, None)
        if prefill is None:
            scratch = self.scratch[rows] = self.scratch.get(rows) or model.empty_cache(rows)
            prefill = Prefill(self.decoder, bucket, scratch)
        logits = prefill(model, ids, [*bounds, bucket])
        if again and prefill.graph is None:  # what runs once is not worth a graph
            prefill.capture(model, self.pool)
        self.prefills[key] = prefill if again else None
        if len(self.prefills) > PREFILLS:
            self.prefills.popitem(last=False)
        cache.conv.copy_(prefill.cache.conv[:, :-1])
        cache.ssm.copy_(prefill.cache.ssm[:, :-1])
        return logits[:-1]


class Prefill:
    """Sequences end to end, of so many tokens in all, into fresh states; without a Decoder by the layers."""

    def __init__(self, decoder: Decoder | None, tokens: int, cache: MambaCache) -> None:
        self.decoder, self.cache, self.graph = decoder, cache, None
        self.ids = torch.zeros(1, tokens, dtype=torch.int64, device=cache.ssm.device)
        self.bounds = torch.zeros(cache.ssm.shape[1] + 1, dtype=torch.int32, device=cache.ssm.device)

    def __call__(self, model: MambaLM, ids: list[int], bounds: list[int]) -> Tensor:
        """The logits [q, v] of each sequence's last token."""
        put(self.ids[0, : len(ids)], torch.tensor(ids))
        put(self.bounds, torch.tensor(bounds, dtype=torch.int32))
        if self.graph is None:
            self.logits = self.run(model)
        else:
            self.graph.replay()
        return self.logits

    def capture(self, model: MambaLM, pool: Pool) -> None:
        """To be called after a run, whose logits the graph's replays overwrite."""
        self.graph = pool.capture(lambda: self.logits.copy_(self.run(model)))

    def run(self, model: MambaLM) -> Tensor:
        if self.decoder is not None and self.decoder.prefills:
            hidden = self.decoder.prefill(self.ids, self.cache, self.bounds)
            return last_logits(model, hidden[0, self.bounds[1:].long() - 1])
        self.cache.conv.zero_()
        self.cache.ssm.zero_()
        return model(self.ids, self.cache, self.bounds, last_only=True).logits[:, 0]


class Loop:
    """Decodes a batch: its states, its last tokens, and the graph of a step."""

    def __init__(self, runner: Runner, model: MambaLM, batch: int, config: SamplingConfig) -> None:
        self.key, self.pool, self.graph = (batch, config), runner.pool, None
        self.decoder = runner.decoder if Decoder.supports(model, batch) else None
        self.cache = model.empty_cache(batch)
        self.sampler = Sampler(config, batch, model.config.vocab_size, model.device)
        options = {"dtype": torch.int64, "device": model.device}
        self.tokens, self.step = torch.zeros(batch, **options), torch.zeros(2, **options)  # see choose
        self.chosen = torch.zeros(BLOCK, batch, **options)  # the tokens of the last steps, -1 for none

    def launch(
        self, model: MambaLM, logits: Tensor, begin: int, count: int
    ) -> tuple[Tensor, torch.cuda.Event]:
        """Steps from `begin` (0: from `logits`): their tokens [count, b], and when they have arrived."""
        for step in range(begin, begin + count):
            self.sampler.draw(step)
            if step == 0:
                self.step.zero_()
                self.choose(logits)
            elif self.graph is not None:
                self.graph.replay()
            elif step == 1:  # warms up for the capture
                self.advance(model)
            else:
                self.graph = self.pool.capture(lambda: self.advance(model))
                self.graph.replay()
        tokens = torch.empty(count, len(self.tokens), dtype=torch.int64, pin_memory=self.tokens.is_cuda)
        tokens.copy_(self.chosen[begin % BLOCK :][:count], non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return tokens, arrived

    def advance(self, model: MambaLM) -> None:
        self.choose(next_logits(model, self.decoder, self.tokens, self.cache))

    def choose(self, logits: Tensor) -> None:
        if self.sampler.greedy:
            vocab = self.sampler.vocab_size
            torch.ops.ternary.choose(logits, vocab, self.tokens, self.chosen, self.step)
            return
        step = self.step[:1]
        tokens, finite = self.sampler(logits, step)
        self.tokens.copy_(tokens)
        row = torch.where(finite, tokens, -1).unsqueeze(0)
        self.chosen.index_copy_(0, step % BLOCK, row)
        step.add_(1)


def _place(model: MambaLM) -> int:
    return model.backbone.norm_f.weight.data_ptr()
