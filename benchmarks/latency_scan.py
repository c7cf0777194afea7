"""One layer's scan at a time: over a sequence (ssd of Mamba-2, selective scan of Mamba-1) and over one token.

A CUDA graph of calls on rotating copies, which together exceed the L2 cache; beside the kernels of mamba_ssm
where it can be imported. z, the gate, is an argument of Mamba-1's scan alone, as in the models.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from records import Record, floor_ms, measure, name_of, nbytes, show
from timing import DTYPES, MODELS, begin, chosen_models, comma_list, copies, write
from torch import Tensor

from ternary_ssm import MambaConfig

BATCHES = {"cuda": [1, 2, 4, 8, 16, 32, 64, 128, 256], "cpu": [1, 8]}
LENGTHS = {"cuda": [(1, 512), (1, 2048), (1, 8192), (8, 2048)], "cpu": [(1, 512)]}
HEADDIM, STATE, STATE1 = 64, 128, 16


def inputs(layer: str, d: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The operators' arguments; d inner channels, `shape` [b, l] or [b]."""
    rand, heads = partial(torch.randn, device=device), d // HEADDIM
    if layer == "Mamba2":
        sizes = {"x": (heads, HEADDIM), "dt": (heads,), "B": (1, STATE), "C": (1, STATE)}
        A = -0.5 - torch.rand(heads, device=device)
    else:
        sizes = {"x": (d,), "dt": (d,), "B": (STATE1,), "C": (STATE1,), "z": (d,)}
        A = -0.5 - torch.rand(d, STATE1, device=device)
    activations = {name: rand(*shape, *size).to(dtype) for name, size in sizes.items()}
    return activations | {"A": A, "D": torch.ones(len(A), device=device), "dt_bias": rand(len(A)) - 4}


def ours(bench: str, t: dict[str, Tensor], state: Tensor | None) -> Callable[[], Any]:
    ops = torch.ops.ternary
    if bench != "step":
        return partial(ops.ssd if bench == "ssd" else ops.selective_scan, **t)
    return partial(ops.selective_scan_update if "z" in t else ops.ssd_update, state=state, **t)


def mamba_ssm(bench: str, t: dict[str, Tensor], state: Tensor | None) -> Callable[[], Any]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    common = {"D": t["D"], "dt_bias": t["dt_bias"], "dt_softplus": True}
    order = [t[name] for name in ("x", "dt", "A", "B", "C")]
    if bench == "ssd":
        return partial(mamba_chunk_scan_combined, *order, chunk_size=256, **common, return_final_states=True)
    if bench == "scan":
        swap = lambda v: v.transpose(1, 2).contiguous()  # noqa: E731
        x, dt, B, C, z = (swap(t[name]) for name in ("x", "dt", "B", "C", "z"))
        options = {"delta_bias": t["dt_bias"], "delta_softplus": True, "return_last_state": True}
        return partial(
            selective_scan_fn, x, dt, t["A"], B.unsqueeze(1), C.unsqueeze(1), D=t["D"], z=z, **options
        )
    if "z" in t:
        return partial(selective_state_update, state, *order, z=t["z"], **common)
    x, dt, A, B, C = order  # expanded with stride 0, which its fast path asks for
    heads = len(A)
    dt, A = dt.unsqueeze(-1).expand_as(x), A[:, None, None].expand(heads, HEADDIM, STATE)
    vectors = {name: t[name].unsqueeze(-1).expand(heads, HEADDIM) for name in ("D", "dt_bias")}
    return partial(selective_state_update, state, x, dt, A, B, C, **vectors, dt_softplus=True)


def cases(args: argparse.Namespace, layer: str) -> Iterator[tuple[str, int, int, torch.dtype]]:
    """(bench, batch, length, state dtype)."""
    bench = "ssd" if layer == "Mamba2" else "scan"
    if bench in args.bench:
        yield from ((bench, *shape, torch.float32) for shape in LENGTHS[args.device])
    if "step" in args.bench:
        yield from (("step", batch, 1, DTYPES[state]) for state in args.states for batch in args.batches)


@torch.inference_mode()
def bench_layer(args: argparse.Namespace, name: str, limits: tuple[float, float]) -> Iterator[Record]:
    (layer, d_model, _), dtype = MODELS[name], DTYPES[args.dtype]
    config = MambaConfig(d_model=d_model, n_layer=1, vocab_size=1, ssm_cfg={"layer": layer})
    impls = {"ternary_ssm": ours} | ({"mamba_ssm": mamba_ssm} if args.peers and args.device == "cuda" else {})
    for bench, batch, length, state_dtype in cases(args, layer):
        step = bench == "step"
        shape, state_shape = (batch,) if step else (batch, length), config.state_shape(batch)
        state_bytes = torch.Size(state_shape).numel() * state_dtype.itemsize
        t = inputs(layer, config.d_inner, shape, dtype, args.device)
        size = nbytes(*t.values(), t["x"]) + state_bytes * (2 if step else 1)  # y is as large as x
        for impl, build in impls.items():
            try:
                run = []
                for _ in range(copies(size, args.device)):
                    state = torch.zeros(state_shape, dtype=state_dtype, device=args.device) if step else None
                    run.append(build(bench, {name: v.clone() for name, v in t.items()}, state))
                times = measure(run, "graph", args.device)
            except Exception as error:  # a peer's refusal is a result too
                if build is ours:
                    raise
                print(f"{bench} {name} {impl} b {batch} l {length}: {type(error).__name__} {error}"[:110])
                continue
            mode = "graph" if args.device == "cuda" else "eager"
            types = name_of(state_dtype), "", args.dtype
            floor = floor_ms(size, 0, args.device, limits)
            record = Record(bench, impl, mode, name, batch, length, *types, *times, floor)
            show(record)
            yield record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=comma_list(), help="names or parts of them: " + ", ".join(MODELS))
    parser.add_argument("--bench", type=comma_list(), default=["ssd", "scan", "step"], help="ssd,scan,step")
    parser.add_argument("--batches", type=comma_list(int), help="of step")
    parser.add_argument(
        "--states", type=comma_list(), default=["fp32"], help="dtypes of step's state: fp32,bf16"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of x (bf16; on the CPU fp32)")


def run(args: argparse.Namespace) -> None:
    on_gpu = args.device == "cuda"
    args.batches = args.batches or BATCHES[args.device]
    args.dtype = args.dtype or ("bf16" if on_gpu else "fp32")
    models = chosen_models(args.models or (list(MODELS) if on_gpu else ["130m"]))
    head, limits = begin(args)
    write(args, head, (record for name in models for record in bench_layer(args, name, limits)))
