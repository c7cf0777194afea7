"""One product at a time: the packed gemm beside torch's dense one, humming and gemlite.

On a GPU a CUDA graph of many calls is replayed; the weights rotate through enough copies that none is
answered from the L2 cache.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timing import DTYPES, SIZES, begin, comma_list, copies, summary, time_cpu, time_graph, write
from torch import Tensor

ROWS = {"cuda": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096], "cpu": [1, 8, 64]}


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


def ours_fp8(p: Problem) -> Callable[[Tensor], Tensor]:
    ternary, scales = p.ternary()
    codes = torch.ops.ternary.pack(ternary)
    return lambda x: torch.ops.ternary.gemm(x, codes, scales, None, "fp8")


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


def bench_shape(
    args: argparse.Namespace, op: str, n: int, k: int, limits: tuple[float, float]
) -> list[Record]:
    """Times every implementation at one shape of the weight and prints the table."""
    bandwidth, peak = limits
    dtype = DTYPES[args.dtype]
    problem = Problem(n, k, args.group_size, dtype, args.device)
    packed, full = n * k // 4 + n * (k // args.group_size) * 2, n * k * dtype.itemsize
    impls = {"ternary_ssm": (ours, "ternary", packed), f"torch {args.dtype}": (dense, args.dtype, full)}
    if args.device == "cuda":
        impls |= {"ternary_ssm fp8": (ours_fp8, "ternary", packed)}
    if args.device == "cuda" and args.peers:
        impls |= {"humming": (humming, "ternary", packed), "gemlite": (gemlite, "ternary", packed)}
    print(f"\n{op}  [{n}, {k}]  group {args.group_size}  {args.dtype}")
    print("    m                        us       p10       p90   TB/s  TFLOP/s  roof  v torch")
    records, medians = [], {}
    for impl, (build, weight, size) in impls.items():
        try:
            run = [build(Problem(**asdict(problem) | {"seed": i})) for i in range(copies(size, args.device))]
        except ImportError:
            print(f"      {impl}: not installed")
            continue
        except Exception as error:
            if build not in (humming, gemlite):
                raise
            print(f"      {impl}: {type(error).__name__} {error}"[:110])
            continue
        for m in args.rows:
            x = torch.randn(m, k, device=args.device).to(dtype)
            moved, flops = size + m * (n + k) * dtype.itemsize, 2 * m * n * k
            try:
                time = time_graph if args.device == "cuda" else time_cpu
                times = [ms * 1e3 for ms in time([partial(call, x) for call in run])]
            except Exception as error:  # a peer's: its refusal is a result too
                if build not in (humming, gemlite):
                    raise
                print(f"{m:>5} {impl:15} {type(error).__name__}: {str(error)[:60]}")
                continue
            medians[impl, m], low, high = summary(times)
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
        print(f"{r.m:>5} {r.impl:15} {us} {rates} {ratio:>7.2f}x", flush=True)
    return records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = ", ".join(SIZES)
    parser.add_argument("--models", type=comma_list(), default=list(SIZES), help=f"of {sizes}")
    parser.add_argument("--rows", type=comma_list(int), help="of x")
    parser.add_argument("--dtype", choices=DTYPES, help="of x (bf16; on the CPU fp32)")
    parser.add_argument("--group-size", type=int, default=128)


def run(args: argparse.Namespace) -> None:
    args.rows = args.rows or ROWS[args.device]
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    if unknown := sorted(set(args.models) - set(SIZES)):
        raise SystemExit(f"--models must be of {', '.join(SIZES)}, not {', '.join(unknown)}")
    head, limits = begin(args)
    write(args, head, bench_ops(args, limits))


def bench_ops(args: argparse.Namespace, limits: tuple[float, float]) -> Iterator[Record]:
    for model in args.models:
        d, _ = SIZES[model]
        yield from bench_shape(args, f"gemm {model} in_proj", 4 * d + 2 * 128 + d // 32, d, limits)
        yield from bench_shape(args, f"gemm {model} out_proj", d, 2 * d, limits)
