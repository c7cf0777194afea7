"""A step of quantization-aware training: its time, its memory, its parts, and what the quantization costs.

    python benchmarks/training.py [--models 130m,1.3b] [--batch 8] [--length 2048] [--recompute 0,1]
                                  [--fp8-teacher] [--steps 10] [--device cuda|cpu] [--out FILE] [--append]
    torchrun --nproc_per_node N benchmarks/training.py [--strategy ddp|fsdp] ...

The step is Distiller.train_step: teacher and student with random weights of the published shapes, random
tokens; on a GPU in bf16, the student's weights and the optimizer in fp32. overhead is its time over that of
the same step with the student's weights as they are; monitor is the share of a step that counting zeros
takes, every monitor_every steps. Prints what it finds and writes a JSON file. By torchrun
each GPU takes --batch sequences of a step, the teacher whole and the student as --strategy says.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import MODELS, begin, chosen_models, comma_list, summary, write
from torch.nn.utils import parametrize

from ternary_ssm import MambaConfig, MambaLM, TernaryConfig, distributed, training
from ternary_ssm.data import TokenStream
from ternary_ssm.distill import DistillConfig, Distiller
from ternary_ssm.loss import distillation_loss
from ternary_ssm.surgery import quantized_layers

VOCAB = 50277


@dataclass
class Record:
    bench: str
    model: str
    gpus: int
    strategy: str
    batch: int  # sequences a step, of all GPUs
    length: int
    recompute: float
    fp8_teacher: bool
    tokens_per_second: float
    peak_gb: float | None  # 10^9 bytes of GPU memory, of the fullest GPU
    step_ms: float
    overhead: float
    monitor: float  # of one step in monitor_every, spread over all
    parts_ms: dict[str, float]  # on one GPU


def distiller(name: str, args: argparse.Namespace, recompute: float, out: Path) -> Distiller:
    layer, d_model, n_layer = MODELS[name]
    config = MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=VOCAB, ssm_cfg={"layer": layer})
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch.manual_seed(0)  # the same on all processes
    teacher = MambaLM(config, device=distributed.local_device(args.device), dtype=dtype)
    options = {"recompute": recompute, "fp8_teacher": args.fp8_teacher, "device": args.device}
    options["strategy"] = args.strategy
    batch = args.batch * distributed.world()
    options["dtype"] = {torch.bfloat16: "bfloat16", torch.float32: "float32"}[dtype]
    tokens = np.random.default_rng(0).integers(0, VOCAB, 4 * batch * args.length).astype(np.uint16)
    settings = DistillConfig(TernaryConfig(), 10**9, args.length, batch, **options)
    return Distiller(teacher, TokenStream(tokens, args.length, batch), settings, out)


def measure(step: Callable[[], Any], args: argparse.Namespace) -> float:
    """Median milliseconds of a step, which waits for the device itself."""
    times = []
    for _ in range(args.steps + 2):  # two to warm up
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return summary(times[2:])[0]


def parts(d: Distiller) -> dict[str, float]:
    """Milliseconds of what a step does, each part waited for."""
    c, times = d.config, []
    wait = torch.cuda.synchronize if c.device == "cuda" else lambda: None

    def mark() -> None:
        wait()
        times.append(time.perf_counter())

    ids = d.stream.batch(0).to(c.device)
    autocast = torch.autocast(c.device, torch.bfloat16, enabled=c.dtype == "bfloat16")
    mark()
    with torch.inference_mode():
        hidden_t = training.frozen(d.teacher.backbone, ids[:, :-1])
    mark()
    with parametrize.cached():
        with autocast:
            for _, layer in quantized_layers(d.student):
                layer.weight  # noqa: B018  rounds it, for the rest of the step
            mark()
            hidden_s = d.student.backbone(ids[:, :-1])
            mark()
            heads = [m.head.weight for m in (d.student, d.teacher)]
            loss, *_ = distillation_loss(hidden_s, hidden_t, *heads, ids[:, 1:], c.kl_weight, c.temperature)
        mark()
        loss.backward()
    mark()
    torch.nn.utils.clip_grad_norm_(d.student.parameters(), c.grad_clip)
    d.optimizer.step()
    d.optimizer.zero_grad()
    mark()
    names = ["teacher", "fake_quantize", "student_forward", "loss", "backward", "optimizer"]
    return {name: (end - start) * 1e3 for name, (start, end) in zip(names, pairwise(times), strict=True)}


def counted_step(d: Distiller) -> None:
    """One whose zeros are counted."""
    config = d.config
    d.config = replace(config, monitor_every=1)
    d.train_step()
    d.rounding.ratios()
    d.config = config


def records(args: argparse.Namespace) -> Iterator[Record]:
    for name in args.models:
        for recompute in args.recompute:
            with tempfile.TemporaryDirectory() as out:
                d = distiller(name, args, recompute, Path(out))
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step_ms = measure(d.train_step, args)
            peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else None
            peak = peak and max(distributed.gather_objects(peak))
            counted_ms = measure(partial(counted_step, d), args)
            gpus, shares = distributed.world(), {}
            if gpus == 1:  # of several, parts would wait for each other
                parts(d)
                shares = parts(d)
            for _, layer in quantized_layers(d.student):
                layer.parametrizations.weight[-1].forward = lambda latent: latent
            dense_ms = measure(d.train_step, args)
            r = Record(
                "training",
                name,
                gpus,
                "single" if gpus == 1 else args.strategy,
                args.batch * gpus,
                args.length,
                recompute,
                args.fp8_teacher,
                args.batch * gpus * args.length / step_ms * 1e3,
                peak,
                step_ms,
                step_ms / dense_ms,
                (counted_ms / step_ms - 1) / d.config.monitor_every,
                shares,
            )
            if distributed.rank() == 0:
                print(
                    f"{name:14} {gpus} {r.strategy} recompute {recompute:<4g} {step_ms:9.1f} ms "
                    f"{r.tokens_per_second:9,.0f} tok/s peak {peak or 0:5.1f} GB, "
                    f"over the dense step {r.overhead:.3f}, monitor {r.monitor:.2%}; "
                    + ", ".join(f"{part} {ms:.1f}" for part, ms in shares.items()),
                    flush=True,
                )
            yield r
            del d
            gc.collect()  # before the next one's memory is counted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=comma_list(), default=["mamba2-1.3b"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--recompute", type=comma_list(float), default=[0.0, 1.0])
    parser.add_argument("--fp8-teacher", action="store_true")
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp", help="of several GPUs")
    parser.add_argument("--steps", type=int, default=10)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=device)
    parser.add_argument("--out", type=Path, help="the JSON file (results/training-DEVICE-DATE.json)")
    parser.add_argument("--append", action="store_true", help="keep the records that the file has")
    args = parser.parse_args(namespace=argparse.Namespace(command="training"))
    args.models = chosen_models(args.models)
    with distributed.session(args.device):
        if distributed.rank():
            list(records(args))
        else:
            head, _ = begin(args)
            write(args, head, records(args))


if __name__ == "__main__":
    main()
