"""What the benchmarks share: clocks, ceilings, the published models' shapes, and the JSON files."""

import argparse
import datetime
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import ternary_ssm
from ternary_ssm import _C

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROTATED_BYTES = {"cuda": 160 << 20, "cpu": 64 << 20}  # more than twice an H200's L2; a desktop CPU's L3
# Width and layers of the published models.
SIZES = {"130m": (768, 24), "370m": (1024, 48), "780m": (1536, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}
MAMBA1_NAMES = {"130m": "130m", "370m": "370m", "780m": "790m", "1.3b": "1.4b", "2.7b": "2.8b"}
MODELS = {f"mamba2-{name}": ("Mamba2", *size) for name, size in SIZES.items()}
MODELS |= {f"mamba-{MAMBA1_NAMES[name]}": ("Mamba1", *size) for name, size in SIZES.items()}


def copies(bytes_each: int, device: str) -> int:
    """How many copies of some data exceed the cache."""
    return max(2, math.ceil(ROTATED_BYTES[device] / max(bytes_each, 1)))


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps 32 MiB for each stream."""
    return torch.cuda.Stream()


def capture(run: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of all calls, each run once before."""
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in {id(call): call for call in run}.values():
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in run:
            call()
    return graph


def time_cuda(call: Callable[[], Any], repeats: int, warm_up: int = 2) -> list[float]:
    """Milliseconds from one call's end to the next one's, on the GPU's clock."""
    for _ in range(warm_up):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]


def time_graph(run: Sequence[Callable[[], Any]], replays: int = 60) -> list[float]:
    """Milliseconds a call, one figure a replay of a graph of 20 calls or more, all of `run` in turn."""
    launches = list(run) * math.ceil(20 / len(run))
    graph = capture(launches)
    return [t / len(launches) for t in time_cuda(graph.replay, replays, warm_up=1)]


def time_cpu(run: Sequence[Callable[[], Any]], seconds: float = 0.3) -> list[float]:
    """Milliseconds of at least 5 calls, of `run` in turn."""
    for call in run[:2]:
        call()
    times, begin = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        run[len(times) % len(run)]()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def summary(times: list[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    low, *_, high = statistics.quantiles(times, n=10, method="inclusive")
    return statistics.median(times), low, high


def ceilings(device: str) -> tuple[float, float]:
    """Bytes a second of a long read, flops a second of a large product: the best of a few tries."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def best(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(6):
            wait()
            begin = time.perf_counter()
            call()
            wait()
            times.append(time.perf_counter() - begin)
        return min(times)

    size, n, dtype = (2 << 30, 8192, torch.bfloat16) if device == "cuda" else (1 << 28, 1536, torch.float32)
    data = torch.zeros(size // 4, device=device)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return size / best(data.amax), 2 * n**3 / best(lambda: a @ b)


def header(device: str, **measured: float) -> dict[str, Any]:
    """When, where and of which commit figures are, and what else was measured of the device."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    root = Path(__file__).resolve().parents[1]
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"),
        "ternary_ssm": ternary_ssm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    } | measured
    if device == "cuda":
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        clocks = output("nvidia-smi", query, "--format=csv,noheader")
        gpu = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        return facts | gpu | {"driver, clocks": clocks}
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    isa = _C.cpu_isa()
    return facts | {"device": cpu, "isa": isa, "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def begin(args: argparse.Namespace) -> tuple[dict[str, Any], tuple[float, float]]:
    """The header of a run, which is printed, and the device's ceilings."""
    limits = ceilings(args.device)
    head = header(args.device, read_bytes_per_s=limits[0], product_flops_per_s=limits[1])
    print(f"{head['device']}: reads {limits[0] / 1e12:.2f} TB/s, multiplies {limits[1] / 1e12:.1f} TFLOP/s")
    return head, limits


def write(args: argparse.Namespace, head: dict[str, Any], records: Iterable[Any]) -> None:
    """Writes the file anew with each record: a run that is ended leaves what it has found."""
    out = args.out or RESULTS / f"{args.command}-{args.device}-{head['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    appends = getattr(args, "append", False) and out.exists()
    done = json.loads(out.read_text())["records"] if appends else []
    for record in records:
        done.append(asdict(record))
        whole = out.with_name(out.name + ".part")
        whole.write_text(json.dumps({"header": head, "records": done}, indent=1) + "\n")
        whole.replace(out)
    print(f"\nwritten to {out}")


def comma_list(kind: Callable[[str], Any] = str) -> Callable[[str], list]:
    """For argparse: a,b,c."""
    return lambda text: [kind(item) for item in text.split(",")]


def chosen_models(parts: list[str]) -> list[str]:
    """The models whose names have one of the parts. SystemExit where a part fits none."""
    for part in parts:
        if not any(part in name for name in MODELS):
            raise SystemExit(f"--models {part}: expected parts of {', '.join(MODELS)}")
    return [name for name in MODELS if any(part in name for part in parts)]
