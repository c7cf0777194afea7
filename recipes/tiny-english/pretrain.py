"""Pretrains the tiny English Mamba-2 language model: the teacher of the demo and of the tests.

    python recipes/tiny-english/pretrain.py --tokenizer DIR --data TEXT [TEXT ...] --eval TEXT --out DIR

10.4 M parameters in the proportions of the published Mamba-2 models (d_model 256, 18 layers, d_state 128,
headdim 64, tied embedding of 8,192 tokens); next-token cross-entropy, bf16 autocast, fp32 weights; AdamW,
warm-up and cosine. mamba_ssm's Triton kernels are used for the scan where they are importable.
Writes the fp16 model, metrics.jsonl and loss.png to DIR.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

from ternary_ssm import MambaConfig, MambaLM
from ternary_ssm.data import TokenStream, load_tokens
from ternary_ssm.evaluate import nats_per_token

CONFIG = MambaConfig(
    d_model=256,
    n_layer=18,
    vocab_size=8192,
    ssm_cfg={"layer": "Mamba2", "d_state": 128, "headdim": 64},
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
PEAK_LR, FINAL_LR = 3e-3, 1e-4
WARMUP_STEPS = 200


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_LR + (PEAK_LR - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: MambaLM) -> list[dict]:
    """Weight decay on matrices alone: not on norms, biases, convolutions, nor the dynamics."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def plot(records: list[dict], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    train = [r for r in records if "loss" in r]
    held_out = [r for r in records if "eval_nats" in r]
    axes.plot([r["tokens"] / 1e6 for r in train], [r["loss"] for r in train], lw=0.8, label="training")
    axes.plot(
        [r["tokens"] / 1e6 for r in held_out], [r["eval_nats"] for r in held_out], "o-", label="held-out"
    )
    axes.set(xlabel="tokens (millions)", ylabel="cross-entropy (nats per token)", ylim=(3, 6))
    axes.set_title("Pretraining of the tiny English Mamba-2")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def read(path: Path, tokenizer: Path) -> np.ndarray:
    return load_tokens(path, CONFIG.vocab_size, tokenizer / "tokenizer.json", CONFIG.eos_token_id)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer.json")
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=300_000_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    train = np.concatenate([read(path, args.tokenizer) for path in args.data])
    held_out = read(args.eval, args.tokenizer)[:262_144]
    print(f"{len(train) / 1e6:.1f} M training tokens", flush=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = MambaLM(CONFIG).to(args.device)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    stream = TokenStream(train, args.sequence_length, args.batch_size, args.seed)
    steps = args.tokens // (args.batch_size * args.sequence_length)
    records, started, log = [], time.time(), (args.out / "metrics.jsonl").open("w")

    def record(step: int, **values: float) -> None:
        tokens = step * args.batch_size * args.sequence_length
        records.append({"step": step, "tokens": tokens, "seconds": round(time.time() - started, 1)} | values)
        for out in (log, sys.stdout):
            print(json.dumps(records[-1]), file=out, flush=True)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        ids = stream.batch(step).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            logits = model(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            if not math.isfinite(loss.item()):
                raise SystemExit(f"step {step}: the loss is {loss.item()}")
            lr = learning_rate(step, steps)
            record(step, loss=round(loss.item(), 4), grad_norm=round(norm.item(), 3), lr=round(lr, 6))
        if (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps:
            nats = nats_per_token(model, held_out, args.sequence_length, batch_size=32)
            record(step + 1, eval_nats=round(nats, 4), eval_perplexity=round(math.exp(nats), 2))
    model.half().save_pretrained(args.out)
    plot(records, args.out / "loss.png")


if __name__ == "__main__":
    main()
