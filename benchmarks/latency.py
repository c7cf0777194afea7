"""Times the operators at the sizes of the published Mamba-2 models, beside what torch and others offer.

    python benchmarks/latency.py ops [--device cuda|cpu] [--models 1.3b,2.7b] [--rows 1,8,64] [--out FILE]

On a GPU a CUDA graph of many calls is replayed; the weights rotate through enough copies that none is
answered from the L2 cache. Peers (humming, gemlite) run where they can be imported. Prints a table a shape
and writes a JSON file.
"""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import ternary_ssm
from ternary_ssm import _C

WIDTHS = {"130m": 768, "370m": 1024, "780m": 1536, "1.3b": 2048, "2.7b": 2560}
ROWS = {"cuda": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096], "cpu": [1, 8, 64]}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROTATED_BYTES = {"cuda": 160 << 20, "cpu": 64 << 20}  # more than twice an H200's L2; a desktop CPU's L3


@dataclass
class Record:
    """One timing. Bytes and flops are what the product needs, not what an implementation spends."""

    op: str
    impl: str
    dtype: str  # of the weight
    activations: str
    group_size: int
    m: int
    n: int
    k: int
    median_us: float
    p10_us: float
    p90_us: float
    bytes: int
    flops: int


@dataclass
class Problem:
    n: int
    k: int
    group: int
    dtype: torch.dtype
    device: str
    seed: int = 0

    def ternary(self) -> tuple[Tensor, Tensor]:
        """int8 [n, k] in {-1, 0, +1}, fp16 scales [n, k / group]."""
        rng = torch.Generator(self.device).manual_seed(self.seed)
        draw = {"device": self.device, "generator": rng}
        scales = 0.01 + 0.02 * torch.rand(self.n, self.k // self.group, **draw)
        return torch.randint(-1, 2, (self.n, self.k), dtype=torch.int8, **draw), scales.half()

    def dense(self) -> Tensor:
        ternary, scales = self.ternary()
        return (ternary * scales.float().repeat_interleave(self.group, 1)).to(self.dtype)


# Each returns a function of x for one copy of the weight.


def ours(p: Problem) -> Callable[[Tensor], Tensor]:
    ternary, scales = p.ternary()
    codes = torch.ops.ternary.pack(ternary)
    return lambda x: torch.ops.ternary.gemm(x, codes, scales)


def dense(p: Problem) -> Callable[[Tensor], Tensor]:
    weight = p.dense()
    return lambda x: F.linear(x, weight)


def humming(p: Problem) -> Callable[[Tensor], Tensor]:
    from humming.layer import HummingLayer

    ternary, scales = p.ternary()
    code = (ternary.abs() | (ternary < 0).to(torch.int8) << 1).long()
    words = (code.view(p.n, -1, 16) << torch.arange(0, 32, 2, device=p.device)).sum(-1)
    config = {"dtype": "float2e0m1", "group_size": p.group}
    layer = HummingLayer(
        shape_n=p.n, shape_k=p.k, weight_config=config, pad_n_to_multiple=128, torch_dtype=p.dtype
    ).to(p.device)
    signed = torch.where(words >= 2**31, words - 2**32, words).int()
    layer.load_from_tensors({"weight": signed, "weight_scale": scales.to(p.dtype)})
    layer.transform()
    return lambda x: layer(x)[..., : p.n]


def gemlite(p: Problem) -> Callable[[Tensor], Tensor]:
    from gemlite import DType, GemLiteLinear

    ternary, scales = p.ternary()
    kind = {torch.bfloat16: DType.BF16, torch.float16: DType.FP16}[p.dtype]
    layer = GemLiteLinear(
        2, group_size=p.group, in_features=p.k, out_features=p.n, input_dtype=kind, output_dtype=kind,
        scaled_activations=False,
    )  # fmt: skip
    layer.pack((ternary + 1).to(torch.uint8), scales=scales.to(p.dtype).reshape(-1, 1), zeros=1, bias=None)
    return layer


def calls(impl: Callable, p: Problem, bytes_a_copy: int) -> list[Callable[[Tensor], Tensor]]:
    """`impl` on as many copies of the weight as exceed the cache."""
    copies = max(2, math.ceil(ROTATED_BYTES[p.device] / bytes_a_copy))
    return [impl(Problem(**{**asdict(p), "seed": i})) for i in range(copies)]


def time_cuda(run: list[Callable[[Tensor], Tensor]], x: Tensor, replays: int = 60) -> list[float]:
    """Microseconds a call, one figure a replay of a graph of all copies."""
    launches = run * math.ceil(20 / len(run))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in run:
            call(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in launches:
            call(x)
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 / len(launches) for begin, end in pairwise(events)]


def time_cpu(run: list[Callable[[Tensor], Tensor]], x: Tensor, seconds: float = 0.3) -> list[float]:
    for call in run[:2]:
        call(x)
    times, begin = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        run[len(times) % len(run)](x)
        times.append((time.perf_counter() - start) * 1e6)
    return times


def ceilings(device: str) -> tuple[float, float]:
    """Bytes a second of a long read, flops a second of a large product: the best of a few tries."""

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def best(call: Callable[[], object]) -> float:
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


def header(device: str, bandwidth: float, peak: float) -> dict:
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
        "read_bytes_per_s": bandwidth,
        "product_flops_per_s": peak,
    }
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


def bench_shape(
    args: argparse.Namespace, op: str, n: int, k: int, limits: tuple[float, float]
) -> list[Record]:
    """Times every implementation at one shape of the weight and prints the table."""
    bandwidth, peak = limits
    dtype = DTYPES[args.dtype]
    problem = Problem(n, k, args.group_size, dtype, args.device)
    packed, full = n * k // 4 + n * (k // args.group_size) * 2, n * k * dtype.itemsize
    impls = {"ternary_ssm": (ours, "ternary", packed), f"torch {args.dtype}": (dense, args.dtype, full)}
    if args.device == "cuda" and args.peers:
        impls |= {"humming": (humming, "ternary", packed), "gemlite": (gemlite, "ternary", packed)}
    print(f"\n{op}  [{n}, {k}]  group {args.group_size}  {args.dtype}")
    print("    m                     us       p10       p90   TB/s  TFLOP/s  roof  v torch")
    records, medians = [], {}
    for impl, (build, weight, size) in impls.items():
        try:
            run = calls(build, problem, size)
        except ImportError:
            print(f"      {impl}: not installed")
            continue
        for m in args.rows:
            x = torch.randn(m, k, device=args.device).to(dtype)
            moved, flops = size + m * (n + k) * dtype.itemsize, 2 * m * n * k
            try:
                times = (time_cuda if args.device == "cuda" else time_cpu)(run, x)
            except Exception as error:  # a peer's: its refusal is a result too
                if build is ours:
                    raise
                print(f"{m:>5} {impl:12} {type(error).__name__}: {str(error)[:60]}")
                continue
            low, *_, high = statistics.quantiles(times, n=10)
            medians[impl, m] = statistics.median(times)
            sizes = (args.dtype, args.group_size, m, n, k)
            records.append(Record(op, impl, weight, *sizes, medians[impl, m], low, high, moved, flops))
        del run
        if args.device == "cuda":
            torch.cuda.empty_cache()
    for r in sorted(records, key=lambda r: r.m):
        share = max(r.bytes / bandwidth, r.flops / peak) * 1e6 / r.median_us
        ratio = medians[f"torch {args.dtype}", r.m] / r.median_us
        us = f"{r.median_us:>9.2f} {r.p10_us:>9.2f} {r.p90_us:>9.2f}"
        rates = f"{r.bytes / r.median_us / 1e6:>6.2f} {r.flops / r.median_us / 1e6:>8.1f} {share:>5.0%}"
        print(f"{r.m:>5} {r.impl:12} {us} {rates} {ratio:>7.2f}x", flush=True)
    return records


def bench_ops(args: argparse.Namespace) -> None:
    limits = ceilings(args.device)
    head = header(args.device, *limits)
    print(f"{head['device']}: reads {limits[0] / 1e12:.2f} TB/s, multiplies {limits[1] / 1e12:.1f} TFLOP/s")
    records = []
    for model in args.models:
        d = WIDTHS[model]
        records += bench_shape(args, f"gemm {model} in_proj", 4 * d + 2 * 128 + d // 32, d, limits)
        records += bench_shape(args, f"gemm {model} out_proj", d, 2 * d, limits)
    out = args.out or Path(__file__).parent / "results" / f"ops-{args.device}-{head['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"header": head, "records": [asdict(r) for r in records]}, indent=1) + "\n")
    print(f"\nwritten to {out}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    ops = commands.add_parser("ops", help="one operator at a time")
    ops.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    ops.add_argument(
        "--models", type=lambda text: text.split(","), default=list(WIDTHS), help="of " + ", ".join(WIDTHS)
    )
    ops.add_argument("--rows", type=lambda text: [int(m) for m in text.split(",")], help="of x")
    ops.add_argument("--dtype", choices=DTYPES, help="of x (bf16; on the CPU fp32)")
    ops.add_argument("--group-size", type=int, default=128)
    ops.add_argument("--no-peers", dest="peers", action="store_false", help="ours and torch alone")
    ops.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/ops-DEVICE-DATE.json)")
    ops.set_defaults(run=bench_ops)
    args = parser.parse_args()
    args.rows = args.rows or ROWS[args.device]
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    if unknown := set(args.models) - set(WIDTHS):
        parser.error(f"--models must be of {', '.join(WIDTHS)}, not {', '.join(sorted(unknown))}")
    args.run(args)


if __name__ == "__main__":
    main()
