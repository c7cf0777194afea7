"""The command ternary-ssm: generate, inspect, quantize, distill, evaluate, export."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .flags import add_flags, from_flags

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from .models import MambaLM

_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 for an error, 2 (raised by argparse) for bad usage."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="ternary-ssm", description="Ternary Mamba language models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (add_arguments, run) in _COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        if argv[:1] == [name]:  # only the command asked for imports what its flags are made from
            add_arguments(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, as `head`, has enough; the flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, RuntimeError) as error:
        message = (str(error) or type(error).__name__).splitlines()[0]
        print(f"ternary-ssm: error: {message}", file=sys.stderr)
        return 1
    return 0


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    from .sampling import SamplingConfig

    parser.add_argument("--model", required=True, metavar="DIR", help="the model and its tokenizer.json")
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a completion")
    parser.add_argument("--device", help="cpu or cuda; by default cuda if there is one")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the activations; as stored by default")
    add_flags(parser, SamplingConfig)


def _generate(args: argparse.Namespace) -> None:
    """Continue prompts: one streams to stdout, several are printed when done."""
    from .generation import TextStreamer, stream
    from .sampling import SamplingConfig

    config, device = from_flags(SamplingConfig, args), _device(args.device)
    tokenizer = _tokenizer(args.model)
    model = _load(args.model, device, args.dtype)
    prompts = [tokenizer.encode(prompt).ids for prompt in args.prompt]
    streamers = [TextStreamer(tokenizer.decode, args.stop) for _ in prompts]
    texts, single = [""] * len(prompts), len(prompts) == 1
    new_tokens, times = 0, [time.perf_counter()]
    for tokens in stream(model, prompts, args.max_new_tokens, config):
        times.append(time.perf_counter())
        for i, token in enumerate(tokens):
            if token is not None and not streamers[i].stopped:
                new_tokens += 1
                texts[i] = _show(texts[i], streamers[i].put(token), single)
        if all(token is None or row.stopped for token, row in zip(tokens, streamers, strict=True)):
            break
    for i, streamer in enumerate(streamers):
        text = _show(texts[i], streamer.end(), single)
        print("" if single else f"--- {args.prompt[i]!r}\n{text}", flush=True)
    if len(times) > 2:  # the first step reads the prompts
        rate = (new_tokens - len(prompts)) / (times[-1] - times[1])
        read = f"{sum(map(len, prompts))} prompt tokens in {times[1] - times[0]:.2f} s"
        print(f"{read}, {new_tokens} new tokens at {rate:.1f} tokens/s", file=sys.stderr)


def _show(text: str, piece: str, now: bool) -> str:
    if now:
        print(piece, end="", flush=True)
    return text + piece


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR")
    parser.add_argument("--layers", action="store_true", help="a line for each layer, not for each kind")


def _inspect(args: argparse.Namespace) -> None:
    """Show a model's tensors: shapes, bits a weight, bytes, share of zeros among ternary weights."""
    model = _load(args.model)
    kinds: dict[tuple[str, tuple[int, ...]], list[tuple[int, float | None]]] = {}
    for name, shape, size, zeros in _tensors(model):
        kind = name if args.layers else re.sub(r"\.\d+\.", ".*.", name)
        kinds.setdefault((kind, shape), []).append((size, zeros))

    table, weights, total = [("tensor", "count", "shape", "bits", "bytes", "zeros")], 0, 0
    for (kind, shape), group in kinds.items():
        count, size = len(group) * math.prod(shape), sum(size for size, _ in group)
        weights, total = weights + count, total + size
        zeros = [zeros for _, zeros in group if zeros is not None]
        span = " - ".join(sorted({f"{z:.3f}" for z in (min(zeros), max(zeros))})) if zeros else ""
        sizes = " x ".join(map(str, shape))
        table.append((kind, str(len(group)), sizes, f"{8 * size / count:.3f}", f"{size:,}", span))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *aligned]).rstrip())

    path = Path(args.model)
    entries = path.iterdir() if path.is_dir() else [path]
    files = [f for f in entries if f.suffix in (".safetensors", ".bin", ".gguf")]
    on_disk = sum(f.stat().st_size for f in files)
    ternary = model.ternary and f"ternary, group size {model.ternary.group_size}"
    print(f"\n{model.config.ssm_cfg['layer']}, {model.config.n_layer} layers, {ternary or 'dense'}")
    print(f"{weights:,} weights, {total:,} bytes, {8 * total / weights:.3f} bits a weight")
    print(f"{2 * weights / total:.2f} x smaller than FP16, {on_disk:,} bytes in files")


def _tensors(model: MambaLM) -> Iterator[tuple[str, tuple[int, ...], int, float | None]]:
    """(name, shape, bytes with scales, share of zeros if ternary) of every weight."""
    from .layers import Int8Table, PackedTable, TernaryLinear

    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear | PackedTable):
            (n, k), zeros = module.weight.shape, None
            if not isinstance(module, Int8Table):
                k, zeros = 4 * k, module.ternary.zero_ratio()
            yield f"{name}.weight", (n, k), module.weight.nbytes + module.weight_scale.nbytes, zeros
        for key, tensor in module.named_parameters(recurse=False):
            yield f"{name}.{key}", tuple(tensor.shape), tensor.nbytes, None


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
    from .config import TernaryConfig

    parser.add_argument("source", metavar="SRC", help="the dense model")
    parser.add_argument("out", metavar="DIR", help="where the ternary model goes")
    parser.add_argument("--dtype", choices=_DTYPES, default="float16", help="of the rest; default: float16")
    add_flags(parser, TernaryConfig)


def _quantize(args: argparse.Namespace) -> None:
    """Round a dense model's weights to ternary, without training."""
    import torch

    from .config import TernaryConfig
    from .surgery import pack_

    config = from_flags(TernaryConfig, args)
    _not_the_same(args.source, args.out)
    model = _load(args.source)
    if model.ternary is not None:
        raise ValueError(f"{args.source}: is ternary already, expected a dense model")
    pack_(model, config).to(getattr(torch, args.dtype)).save_pretrained(args.out)


def _distill_arguments(parser: argparse.ArgumentParser) -> None:
    from .distill import DistillConfig

    parser.add_argument("--teacher", required=True, metavar="DIR", help="the dense model")
    words = ".npy, .bin, .txt, .jsonl, .parquet, a directory of such text, or hf:NAME[[:CONFIG]:SPLIT]"
    parser.add_argument("--data", required=True, metavar="FILE", help=words)
    parser.add_argument("--eval-data", metavar="FILE")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--resume", action="store_true", help="go on from the last state in --out")
    parser.add_argument(
        "--replay", metavar="FILE", help="do the one step again that left this file in dumps/"
    )
    words = "where the teacher's logits go under --teacher-top-k; default: teacher_cache in --out"
    parser.add_argument("--teacher-cache", metavar="DIR", help=words)
    add_flags(parser, DistillConfig)


def _distill(args: argparse.Namespace) -> None:
    """Train a ternary student of a dense model; under torchrun, on several GPUs."""
    from .distill import DistillConfig, distill, replay

    config = from_flags(DistillConfig, args)
    _device(config.device)
    _not_the_same(args.teacher, args.out)
    inputs, cache = (args.teacher, args.data, args.out, config), args.teacher_cache
    if args.replay is not None:
        print(replay(*inputs, args.replay, teacher_cache=cache))
    else:
        distill(*inputs, eval_data=args.eval_data, resume=args.resume, teacher_cache=cache)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="the model and its tokenizer.json")
    parser.add_argument("--tasks", required=True, metavar="NAME,...", help="of lm-evaluation-harness")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task")
    parser.add_argument("--batch-tokens", type=int, default=16384, metavar="N", help="default: 16384")
    parser.add_argument("--max-length", type=int, default=2048, metavar="N", help="default: 2048")
    parser.add_argument("--out", metavar="FILE", help="gets the results as JSON")
    parser.add_argument("--device", help="cpu or cuda; by default cuda if there is one")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the activations; as stored by default")


def _evaluate(args: argparse.Namespace) -> None:
    """Measure a model on tasks of lm-evaluation-harness."""
    try:
        import lm_eval
    except ImportError:
        raise ValueError("evaluate needs lm-evaluation-harness: pip install 'ternary-ssm[eval]'") from None
    from lm_eval.utils import make_table

    from .harness import HarnessLM

    device, tokenizer = _device(args.device), _tokenizer(args.model)
    model = _load(args.model, device, args.dtype)
    results = lm_eval.simple_evaluate(
        model=HarnessLM(model, tokenizer, args.batch_tokens, args.max_length),
        tasks=args.tasks.split(","),
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        log_samples=False,
    )
    print(make_table(results))
    if args.out is not None:
        kept = ("results", "versions", "n-shot", "n-samples", "lm_eval_version", "git_hash")
        found = {name: results[name] for name in kept if name in results}
        Path(args.out).write_text(json.dumps(found, indent=1, default=str) + "\n")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    from .checkpoints.gguf import TYPES

    parser.add_argument("model", metavar="DIR", help="the model and its tokenizer.json")
    parser.add_argument("out", metavar="FILE.gguf")
    words = "of the weights; default: tq2_0 if the model is ternary, else f16"
    parser.add_argument("--type", choices=TYPES, help=words)


def _export(args: argparse.Namespace) -> None:
    """Write a model as one file for llama.cpp."""
    from .checkpoints import gguf

    if not args.out.endswith(".gguf"):
        raise ValueError(f"{args.out}: expected a file name that ends in .gguf")
    model = _load(args.model)
    kind = args.type or ("f16" if model.ternary is None else "tq2_0")
    gguf.write(args.out, model.config, model.ternary, model.state_dict(), Path(args.model), kind)


_COMMANDS = {
    "generate": (_generate_arguments, _generate),
    "inspect": (_inspect_arguments, _inspect),
    "quantize": (_quantize_arguments, _quantize),
    "distill": (_distill_arguments, _distill),
    "evaluate": (_evaluate_arguments, _evaluate),
    "export": (_export_arguments, _export),
}


def _device(name: str | None) -> torch.device:
    import torch

    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name}, expected cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"--device is {name}, torch sees {count} CUDA devices")
    return device


def _load(directory: str, device: torch.device | str = "cpu", dtype: str | None = None) -> MambaLM:
    import torch

    from .models import MambaLM

    return MambaLM.from_pretrained(directory, device, dtype and getattr(torch, dtype))


def _tokenizer(directory: str) -> Tokenizer:
    from tokenizers import Tokenizer

    path = Path(directory)
    path = (path.parent if path.is_file() else path) / "tokenizer.json"  # beside a .gguf
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected the model's tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path}: not a readable tokenizer: {error}") from None
    tokenizer.no_truncation()  # a tokenizer.json may ask for either
    tokenizer.no_padding()
    return tokenizer


def _not_the_same(source: str, out: str) -> None:
    if Path(source).resolve() == Path(out).resolve():
        raise ValueError(f"{out}: is the source as well, expected another directory")
