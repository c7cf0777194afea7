"""What training is worth, by loss and number of tokens: the tiny English teacher made ternary in many ways.

    python recipes/tiny-english/study.py --data TOKENS.npy --held-out TEXT --lambada FILE.jsonl
                                         [--teacher DIR] [--device cuda|cpu] [--jobs 5] [--out FILE]

Compares the teacher, plain rounding, and students trained on text alone, on the teacher alone and on half of
each, for --tokens and --seeds; then trained scales, which collapse. A seed is an order of the same tokens.
Held-out loss and LAMBADA are those of the packed students in fp16. FILE gets each result as it comes; what is
in it already is not run again. `python benchmarks/report.py` makes the table and the plots of it.

--data, --held-out: what `ternary-ssm distill --data` reads. --lambada: lines of {"context", "continuation"},
also .xz. --jobs: runs at a time, each a process; on a GPU each waits more for Python than for the GPU.
"""

import argparse
import json
import lzma
import math
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from ternary_ssm import MambaLM, TernaryConfig, pack_
from ternary_ssm.data import TokenStream, load_tokens
from ternary_ssm.distill import DistillConfig, Distiller, DistillError
from ternary_ssm.evaluate import nats_per_token
from ternary_ssm.surgery import quantized_layers

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import timing  # noqa: E402

os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")  # what one process has tuned, the others need not
KL_WEIGHTS = (0.0, 1.0, 0.5)  # text alone, teacher alone, both
LEARNING_RATE = 1e-3
CURVE_POINTS = 60


@dataclass(frozen=True)
class Run:
    rule: str  # "dense": the teacher itself
    kl_weight: float | None  # None: not trained
    tokens: int
    seed: int = 0


def runs_of(tokens: list[int], seeds: int) -> list[Run]:
    """Whole rows of the table as early as can be."""
    runs = [Run("dense", None, 0), Run("absmean", None, 0)]
    for n in sorted(tokens):
        for seed in range(seeds):
            runs += [Run("absmean", weight, n, seed) for weight in KL_WEIGHTS]
            runs += [Run("learned", 0.5, n)] if (n, seed) == (max(tokens), 0) else []
    return runs


def words(path: Path, tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    """LAMBADA's passages as (tokens, how many of them are the last word's), the shortest first."""
    items = []
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        for line in file:
            item = json.loads(line)
            context = tokenizer.encode(item["context"]).ids
            ids = tokenizer.encode(f"{item['context']} {item['continuation']}").ids
            items.append((ids, len(ids) - len(context)))
    return sorted(items, key=lambda item: len(item[0]))


@torch.inference_mode()
def last_words(model: MambaLM, items: list[tuple[list[int], int]], batch: int = 64) -> tuple[float, float]:
    """(perplexity of the words, the share of them that greedy decoding gives), as lm-evaluation-harness."""
    nats, right = 0.0, 0
    for start in range(0, len(items), batch):
        rows = items[start : start + batch]
        ids = torch.zeros(len(rows), len(rows[-1][0]) - 1, dtype=torch.long)  # filled up behind the word
        for row, (tokens, _) in zip(ids, rows, strict=True):
            row[: len(tokens) - 1] = torch.tensor(tokens[:-1])
        hidden = model.backbone(ids.to(model.device))
        spans = [torch.arange(len(tokens) - 1 - n, len(tokens) - 1) for tokens, n in rows]
        of_words = [row[span.to(row.device)] for row, span in zip(hidden, spans, strict=True)]
        logits = model.logits(torch.cat(of_words)).float()
        labels = torch.tensor([token for tokens, n in rows for token in tokens[-n:]], device=logits.device)
        nats += F.cross_entropy(logits, labels, reduction="sum").item()
        hits = (logits.argmax(-1) == labels).cpu().split([n for _, n in rows])
        right += sum(hit.all().item() for hit in hits)
    return math.exp(nats / len(items)), right / len(items)


class Scales:
    """Of each layer's trained scales: their mean over that at the beginning; over the backward passes since
    the last record, their mean gradient and the share of groups where it is negative: those it raises."""

    def __init__(self, student: MambaLM) -> None:
        self._scales = {n: layer.parametrizations.weight[-1].scale for n, layer in quantized_layers(student)}
        self._start = {name: scale.detach().mean() for name, scale in self._scales.items()}
        self._gradients: dict[str, list[Tensor]] = {name: [] for name in self._scales}
        for name, scale in self._scales.items():
            scale.register_hook(partial(self._note, self._gradients[name]))

    @staticmethod
    def _note(noted: list[Tensor], grad: Tensor) -> None:
        noted.append(torch.stack([grad.mean(), (grad < 0).float().mean()]))

    def record(self) -> dict[str, dict[str, float]]:
        means = {name: torch.stack(noted).mean(0).tolist() for name, noted in self._gradients.items()}
        for noted in self._gradients.values():
            noted.clear()
        return {
            "scale": {n: (s.detach().mean() / self._start[n]).item() for n, s in self._scales.items()},
            "scale_gradient": {name: mean for name, (mean, _) in means.items()},
            "scale_rises": {name: share for name, (_, share) in means.items()},
        }


class Study:
    """What every run of a process shares."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, Path(tempfile.gettempdir()) / "study"  # for dumps of a failed step
        model = MambaLM.from_pretrained(args.teacher)
        file, vocab = args.teacher / "tokenizer.json", model.config.vocab_size
        eos = next(iter(model.config.end_ids), None)
        self.tokens, self.held_out = (load_tokens(p, vocab, file, eos) for p in (args.data, args.held_out))
        self.words = words(args.lambada, Tokenizer.from_file(str(file)))

    def result(self, run: Run) -> dict[str, Any]:
        start, found, model = time.perf_counter(), {}, None
        if run.kl_weight is None:
            model = MambaLM.from_pretrained(self.args.teacher, self.args.device, torch.float32)
            model = (model if run.rule == "dense" else pack_(model, TernaryConfig())).half()
        else:
            model, found = self._train(run)
        if model is not None:
            found["nats"] = nats_per_token(model, self.held_out, self.args.sequence_length, 64)
            found["perplexity"], found["accuracy"] = last_words(model, self.words)
        return asdict(run) | found | {"seconds": time.perf_counter() - start}

    def _train(self, run: Run) -> tuple[MambaLM | None, dict[str, Any]]:
        args = self.args
        config = DistillConfig(
            TernaryConfig(rule=run.rule),
            run.tokens,
            args.sequence_length,
            args.batch_size,
            learning_rate=LEARNING_RATE,
            kl_weight=run.kl_weight,
            seed=run.seed,
            device=args.device,
            dtype="bfloat16" if args.device == "cuda" else "float32",
            monitor_every=max(1, run.tokens // (CURVE_POINTS * args.batch_size * args.sequence_length)),
        )
        teacher = MambaLM.from_pretrained(args.teacher, dtype=torch.float32)
        stream = TokenStream(self.tokens, config.sequence_length, config.batch_size, run.seed)
        distiller = Distiller(teacher, stream, config, self.folder)
        scales = Scales(distiller.student) if run.rule == "learned" else None
        curve, found = [], {"steps": config.steps}
        try:
            for _ in range(config.steps):  # not train(): a collapse is to be seen to its end
                record = distiller.train_step()
                if ratios := distiller.rounding.ratios():
                    point = {k: record[k] for k in ("step", "tokens", "loss", "kl", "ce")}
                    curve.append(point | {"zero_ratio": ratios} | (scales.record() if scales else {}))
        except DistillError as error:
            found["error"] = str(error)
        if curve:
            found["zero_ratio"] = float(np.mean(list(curve[-1]["zero_ratio"].values())))
        if (run.kl_weight, run.tokens, run.seed) == (0.5, max(args.tokens), 0):
            found["curve"] = curve
        return None if "error" in found else distiller.packed(), found


def prepare(args: argparse.Namespace) -> None:
    """Begins a process."""
    global STUDY
    torch.set_num_threads(1)
    STUDY = Study(args)


def result(run: Run) -> dict[str, Any]:
    return STUDY.result(run)


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """The contents of args.out, with no records if there is no such file."""
    settings = {k: getattr(args, k) for k in ("tokens", "sequence_length", "batch_size")}
    settings["learning_rate"] = LEARNING_RATE
    if not args.out.exists():
        return {"header": timing.header(args.device), "settings": settings, "records": []}
    data = json.loads(args.out.read_text())
    if data["settings"] != settings:
        raise SystemExit(f"{args.out} is of a study with {data['settings']}, this one has {settings}")
    return data


def add(out: Path, data: dict[str, Any], record: dict[str, Any]) -> None:
    """Takes the record into the data and the file, which is whole at any time."""
    data["records"].append(record)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(data) + "\n")
    os.replace(temporary, out)
    shown = (
        f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items() if k != "curve"
    )
    print(len(data["records"]), *shown, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"type": lambda text: [int(n) for n in text.split(",")]}
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--lambada", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, default=ROOT / "models/tiny-english/teacher")
    parser.add_argument("--tokens", **numbers, default=[240_000, 2_400_000, 12_000_000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=5)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=device)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/study.json")
    args = parser.parse_args()

    data = begin(args)
    fields = Run.__dataclass_fields__
    done = {Run(**{name: record[name] for name in fields}) for record in data["records"]}
    todo = [run for run in runs_of(args.tokens, args.seeds) if run not in done]
    trained = [run for run in todo if run.kl_weight is not None]
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), prepare, (args,)) as pool:
        if trained:  # alone: Triton compiles and tunes in it, for all
            add(args.out, data, pool.submit(result, trained[0]).result())
        for future in as_completed([pool.submit(result, run) for run in todo if run not in trained[:1]]):
            add(args.out, data, future.result())


if __name__ == "__main__":
    main()
