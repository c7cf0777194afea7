"""The recipe's commands at full size without its data: random weights, random tokens, and a kill on the way.

    python recipes/mamba2-1.3b/proof.py --tokenizer tokenizer.json --work DIR [--out FILE.json]

A teacher of the shape of mamba2-1.3b is written to DIR (40 GB of disk are needed) and distilled by
`ternary-ssm distill`, which gets SIGKILL some steps after its first checkpoint and goes on with --resume. The
packed student then continues a prompt. FILE.json says what happened; the losses of the steps that were done
twice, before the kill and after it, should agree.
"""

import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ternary_ssm import MambaConfig, MambaLM, runs

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import timing

VOCAB = 50277


def make_teacher(args: argparse.Namespace) -> int:
    """Writes it; its number of parameters."""
    torch.manual_seed(0)
    sizes = {"d_model": args.d_model, "n_layer": args.n_layer, "vocab_size": VOCAB}
    model = MambaLM(
        MambaConfig(**sizes, ssm_cfg={"layer": "Mamba2"}), device=args.device, dtype=torch.float16
    )
    model.save_pretrained(args.work / "teacher")
    shutil.copy(args.tokenizer, args.work / "teacher" / "tokenizer.json")
    tokens = args.steps * args.batch_size * args.length + 1
    ids = np.random.default_rng(0).integers(1, VOCAB, tokens)
    np.save(args.work / "tokens.npy", ids.astype(np.uint16))
    return sum(p.numel() for p in model.parameters())


def distil(args: argparse.Namespace, *more: str) -> subprocess.Popen:
    tokens = args.steps * args.batch_size * args.length
    names = {"teacher": args.work / "teacher", "data": args.work / "tokens.npy", "out": args.work / "run"}
    names |= {"tokens": tokens, "sequence-length": args.length, "batch-size": args.batch_size}
    names |= {"save-every": args.steps // 2, "log-every": 1, "recompute": 0.1, "device": args.device}
    names |= {"dtype": "bfloat16" if args.device == "cuda" else "float32"}
    flags = [text for name, value in names.items() for text in (f"--{name}", str(value))]
    return subprocess.Popen([sys.executable, "-m", "ternary_ssm", "distill", "--fp8-teacher", *flags, *more])


def last_step(run: Path) -> int:
    return max((r["step"] for r in runs.read_metrics(run)), default=0)


def kill(process: subprocess.Popen, run: Path, steps: int) -> float:
    """Waits for a checkpoint and `steps` more, then kills it; the seconds that the checkpoint took."""
    begun = written = 0.0
    while process.poll() is None:
        if not begun and (run / "checkpoints" / "unfinished.tmp").exists():
            begun = time.perf_counter()
        if not written and (found := runs.checkpoints(run)):
            written = time.perf_counter()
            target = int(found[0].stem.removeprefix("step-")) + steps
        if written and last_step(run) >= target:
            time.sleep(random.random() / 10)  # anywhere in a step
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    if process.wait() != -signal.SIGKILL:
        raise SystemExit(
            f"the run ended by itself, with exit code {process.returncode}, before it was killed"
        )
    return written - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/proof.json")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--n-layer", type=int, default=48)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=device)
    args = parser.parse_args()

    args.work.mkdir(parents=True)
    run, seconds, start = args.work / "run", {}, time.perf_counter()
    header = timing.header(args.device)
    report = {"parameters": make_teacher(args)}
    report |= {name: getattr(args, name) for name in ("steps", "batch_size", "length")}

    def lap(name: str) -> None:
        nonlocal start
        start, now = time.perf_counter(), time.perf_counter() - start
        seconds[name] = round(now, 1)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        records = [report | {"seconds": seconds}]
        args.out.write_text(json.dumps({"header": header, "records": records}, indent=1) + "\n")
        print(f"{name}: {now:.1f} s", flush=True)

    if args.device == "cuda":
        torch.cuda.empty_cache()
    lap("teacher written")
    seconds["checkpoint written"] = round(kill(distil(args), run, random.randint(2, args.steps // 4)), 1)
    before = {r["step"]: r["loss"] for r in runs.read_metrics(run) if "loss" in r}
    checkpoint = runs.checkpoints(run)[-1]
    report |= {"killed_after_step": max(before), "checkpoint_bytes": checkpoint.stat().st_size}
    lap("until the kill")

    resumed = distil(args, "--resume")
    if resumed.wait():
        raise SystemExit(f"the resumed run ended with exit code {resumed.returncode}")
    lap("resumed until the end")
    records = [r for r in runs.read_metrics(run) if "loss" in r]
    after = {r["step"]: r["loss"] for r in records}
    done = int(checkpoint.stem.removeprefix("step-"))
    twice = [step for step in before if step > done]
    if not twice or list(after) != list(range(1, args.steps + 1)):
        raise SystemExit(f"steps done twice: {twice}; steps logged: {list(after)}")
    report |= {
        "resumed_after_step": done,
        "steps_done_twice": len(twice),
        "difference": max(abs(after[s] / before[s] - 1) for s in twice),
        "losses": {step: after[step] for step in (1, done, done + 1, args.steps)},
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in records[2:]),
    }

    command = [sys.executable, "-m", "ternary_ssm", "generate", "--model", run, "--device", args.device]
    command += ["--prompt", "The", "--max-new-tokens", "32"]
    text = subprocess.run(command, check=True, capture_output=True, text=True)
    for name, folder in (("teacher_bytes", args.work / "teacher"), ("student_bytes", run)):
        report[name] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    report |= {"characters_generated": len(text.stdout), "generate_says": text.stderr.splitlines()[-1]}
    lap("32 tokens generated")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
