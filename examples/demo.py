"""The main job on this machine's CPU: make the shipped language model ternary, and compare.

    make demo          or          python examples/demo.py [--tokens N]

Loads the FP16 teacher in models/tiny-english, rounds it to ternary without training, distils a ternary
student from it on the sample text beside it, prints the perplexity and the size of all, and generates. Writes
the packed student, its metrics and a plot to out/demo. The teacher has not seen the texts, which are in the
public domain.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer

from ternary_ssm import _C, MambaLM, TernaryConfig, pack_
from ternary_ssm.data import load_tokens
from ternary_ssm.distill import DistillConfig, distill
from ternary_ssm.evaluate import nats_per_token

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-english"
OUT = ROOT / "out" / "demo"
PROMPT = "It was a cold morning when the old man"


def megabytes(directory: Path) -> float:
    return sum(f.stat().st_size for f in directory.glob("*.safetensors")) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=40_000, help="training tokens of the distillation")
    args = parser.parse_args()
    started = time.time()
    shutil.rmtree(OUT, ignore_errors=True)  # of an earlier demonstration
    ternary = TernaryConfig(group_size=128, embedding="int8")

    print(f"1. The teacher, {MODEL / 'teacher'}", flush=True)
    teacher = MambaLM.from_pretrained(MODEL / "teacher", dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(MODEL / "teacher" / "tokenizer.json"))
    held_out = load_tokens(
        MODEL / "held_out.txt", teacher.config.vocab_size, MODEL / "teacher" / "tokenizer.json", 0
    )[:16_384]

    print("2. Rounded to ternary, without training", flush=True)
    rounded = pack_(MambaLM.from_pretrained(MODEL / "teacher", dtype=torch.float32), ternary)

    print(f"3. Distilled for {args.tokens:,} tokens", flush=True)
    config = DistillConfig(
        ternary=ternary, tokens=args.tokens, sequence_length=128, batch_size=4, learning_rate=1e-3
    )
    distill(MODEL / "teacher", MODEL / "sample.txt", OUT, config)
    student = MambaLM.from_pretrained(OUT, dtype=torch.float32)
    shipped = MambaLM.from_pretrained(MODEL / "student", dtype=torch.float32)

    results = []
    print(f"\n{'model':44}{'perplexity':>12}{'size, MB':>12}")
    rows = [
        ("FP16 teacher", teacher, megabytes(MODEL / "teacher")),
        ("ternary, rounded without training", rounded, megabytes(OUT)),
        (f"ternary, distilled here on {args.tokens:,} tokens", student, megabytes(OUT)),
        ("ternary, the shipped student", shipped, megabytes(MODEL / "student")),
    ]
    for name, model, size in rows:
        perplexity = math.exp(nats_per_token(model, held_out, sequence_length=512, batch_size=8))
        print(f"{name:44}{perplexity:12.1f}{size:12.2f}", flush=True)
        results.append({"model": name, "perplexity": round(perplexity, 2), "size_mb": round(size, 2)})

    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    for name, model in (
        ("teacher", teacher),
        ("student distilled here", student),
        ("shipped student", shipped),
    ):
        text = tokenizer.decode(model.generate(ids, 60, temperature=0.7, top_p=0.9, seed=1)[0].tolist())
        print(f"\n[{name}] {text}")
    seconds = round(time.time() - started)
    header = {"command": "make demo", "tokens": args.tokens, "seconds": seconds, "torch": torch.__version__}
    header |= {"cpu_isa": _C.cpu_isa(), "threads": torch.get_num_threads()}
    (OUT / "results.json").write_text(json.dumps(header | {"results": results}, indent=2) + "\n")
    print(f"\n{seconds} s. Plot: {OUT / 'plot.png'}, figures: {OUT / 'results.json'}")
    print(
        f'Next: ternary-ssm generate --model {MODEL / "student"} --prompt "Once upon a time" '
        "--temperature 0.8"
    )


if __name__ == "__main__":
    main()
