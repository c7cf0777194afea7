"""Trains a ternary student from its own dense teacher, from files to files.

The recipe is that of arXiv 2606.18114: half KL(teacher || student), half cross-entropy, and scales that are
recomputed from the latent weights at each step (rules that train them instead: quantizer.FakeQuantize).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from . import distributed, runs
from .data import TokenStream, load_tokens
from .loss import distillation_loss
from .models import MambaLM
from .monitor import ZERO_RATIO_LIMITS
from .recipe import DistillConfig
from .trainer import Distiller, DistillError

__all__ = ["DistillConfig", "DistillError", "Distiller", "distill", "distillation_loss", "replay"]


def distill(
    teacher: str | Path,
    data: str | Path,
    out: str | Path,
    config: DistillConfig,
    eval_data: str | Path | None = None,
    resume: bool = False,
    teacher_cache: str | Path | None = None,
) -> MambaLM | None:
    """Distils the dense model in directory `teacher` into a ternary one; returns it packed, in fp16.

    data, eval_data: what load_tokens reads, text by the teacher's tokenizer.json.
    out: gets the packed student, metrics.jsonl, plot.png and checkpoints/.
    resume: see Distiller.train. teacher_cache: see Distiller.
    Started by torchrun, all processes train together; then rank 0 alone writes, and the others return None.
    """
    out = Path(out)
    with distributed.session(config.device):
        distiller = _distiller(Path(teacher), data, out, config, eval_data, teacher_cache)
        distiller.train(resume)
        student = distiller.packed()
        if student is not None:
            student.save_pretrained(out)
            runs.plot_metrics(out, ZERO_RATIO_LIMITS[config.ternary.rule][0])
        distributed.first(lambda: None)  # the others wait for the files
        return student


def replay(
    teacher: str | Path,
    data: str | Path,
    out: str | Path,
    config: DistillConfig,
    dump: str | Path,
    teacher_cache: str | Path | None = None,
) -> dict[str, Any]:
    """Does the step again that left `dump` in out/dumps: its record, or the DistillError once more."""
    with distributed.session(config.device):
        distiller = _distiller(Path(teacher), data, Path(out), config, None, teacher_cache)
        return distiller.replay(Path(dump))


def _distiller(teacher: Path, data, out: Path, config: DistillConfig, eval_data, teacher_cache) -> Distiller:
    model = MambaLM.from_pretrained(teacher, dtype=torch.float32)
    tokens = _tokens(data, model, teacher, out / "tokens-train.npy", config.tokens + 1)
    eval_tokens = None
    if eval_data is not None:
        eval_tokens = _tokens(eval_data, model, teacher, out / "tokens-eval.npy", None)
    stream = TokenStream(tokens, config.sequence_length, config.batch_size, config.seed)
    ends = _document_ends(model, teacher) if config.reset_at_documents else ()
    cache = None if teacher_cache is None else Path(teacher_cache)
    return Distiller(model, stream, config, out, eval_tokens, cache, ends)


def _tokens(path: str | Path, model: MambaLM, teacher: Path, file: Path, limit: int | None) -> np.ndarray:
    """load_tokens; of several processes one reads text into `file`, and all map it."""

    def load() -> np.ndarray:
        eos = next(iter(model.config.end_ids), None)
        return load_tokens(path, model.config.vocab_size, teacher / "tokenizer.json", eos, limit)

    if distributed.world() == 1 or Path(path).suffix in (".npy", ".bin"):
        return load()
    distributed.first(lambda: runs.save_array(file, load()))
    return np.load(file, mmap_mode="r")


def _document_ends(model: MambaLM, teacher: Path) -> tuple[int, ...]:
    ends = model.config.end_ids
    if not ends and (file := teacher / "tokenizer.json").is_file():
        eos = Tokenizer.from_file(str(file)).token_to_id("<|endoftext|>")
        ends = () if eos is None else (eos,)
    return ends
