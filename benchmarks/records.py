"""One timing of a model or of a scan, and how its floor is counted."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timing import capture, summary, time_cpu, time_cuda
from torch import Tensor

TURN = 0.4  # seconds; a call may take longer
READ, MULTIPLY = 4.4e12, 0.79e15  # an H200's bytes and dense 16-bit flops a second


@dataclass
class Record:
    """floor_ms is what the device's memory and multipliers need at least, computed from the shapes:
    the longer of bytes / 4.4 TB/s and flops / 790 TFLOP/s (on a CPU: of what the header says it can do).

    Bytes: of a model, every weight once, and every state once in prefill (written), twice in decoding; of a
    single scan, inputs, outputs and states. Flops: of the projections and the head.
    """

    bench: str  # decode, prefill; ssd, scan, step
    impl: str
    mode: str  # eager, graph
    model: str
    batch: int
    length: int
    state_dtype: str
    head_dtype: str
    activations: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    peak_mb: float | None  # of GPU memory, weights included
    floor_ms: float
    tokens_per_second: float = field(init=False)

    def __post_init__(self) -> None:
        self.tokens_per_second = self.batch * self.length / self.median_ms * 1e3


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8"}[dtype]


def floor_ms(size: int, flops: int, device: str, limits: tuple[float, float]) -> float:
    read, multiply = (READ, MULTIPLY) if device == "cuda" else limits
    return max(size / read, flops / multiply) * 1e3


def measure(run: list[Callable[[], Any]], mode: str, device: str) -> tuple[float, float, float, float | None]:
    """Median, 10th and 90th percentile of the milliseconds a call of `run` in turn, and the peak in MB."""
    if device == "cpu":
        return *summary(time_cpu(run, seconds=1.0)), None

    def calls() -> None:
        for call in run:
            call()

    torch.cuda.reset_peak_memory_stats()
    calls()
    call = capture(run).replay if mode == "graph" else calls
    times = [ms / len(run) for ms in time_cuda(call, repeats=20 if mode == "graph" else 10)]
    return *summary(times), torch.cuda.max_memory_allocated() / 1e6


def measure_in_turn(runs: list[list[Callable[[], Any]]], rounds: int = 5) -> list[tuple]:
    """What `measure` gives, of several on a CPU: its speed drifts, so they take turns."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run[0]()
    for _ in range(rounds):
        for (call, *_), found in zip(runs, times, strict=True):
            end = time.perf_counter() + TURN
            while True:
                start = time.perf_counter()
                call()
                found.append((time.perf_counter() - start) * 1e3)
                if time.perf_counter() > end:
                    break
    return [(*summary(found), None) for found in times]


def show(record: Record) -> None:
    r = record
    what = f"{r.bench:8}{r.model:13}{r.impl:12}{r.mode:6} b {r.batch:<4} l {r.length:<5}"
    types = f"{r.activations} head {r.head_dtype or '-':5} state {r.state_dtype:5}"
    rate = f"{r.tokens_per_second:>11,.0f} tok/s"
    spread = f"({r.p10_ms:.3f} - {r.p90_ms:.3f})"
    print(f"{what}{types} {r.median_ms:>9.3f} ms {spread:21} floor {r.floor_ms:.3f} {rate}", flush=True)


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)
