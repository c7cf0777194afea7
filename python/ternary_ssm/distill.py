"""Trains a ternary student from its own dense teacher: loss, schedule, training loop, checkpoints.

The recipe is that of arXiv 2606.18114: half KL(teacher || student), half cross-entropy, and scales that are
recomputed from the latent weights at each step (rules that train them instead: quantizer.FakeQuantize).
"""

from __future__ import annotations

import copy
import hashlib
import math
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from tqdm import tqdm

from . import runs, training
from .config import TernaryConfig
from .data import TokenStream, load_tokens
from .evaluate import nats_per_token
from .fp8 import fp8_
from .loss import distillation_loss
from .models import MambaLM
from .quantizer import FakeQuantize
from .surgery import pack_, quantize_, quantized_layers

# Zero ratios that warn and that end a run, by rule. Gaussian and Laplacian weights give 0.31 and 0.39 under
# absmean, 0.42 and 0.50 under twn, 0.46 and 0.63 under mse, where trained scales may rightly go. A collapse
# goes to 0.9.
ZERO_RATIO_LIMITS = {
    "absmean": (0.5, 0.6),
    "twn": (0.6, 0.7),
    "mse": (0.7, 0.8),
    "learned": (0.7, 0.8),
    "bounded": (0.7, 0.8),
}


class DistillError(RuntimeError):
    """A run that cannot go on or be resumed: where it stood, what was expected, what was found."""


@dataclass(frozen=True)
class DistillConfig:
    """How to distil. Fields that say `every` count steps.

    tokens: to train on in all, rounded up to whole steps of batch_size * sequence_length.
    learning_rate: the peak, after a linear warm-up over warmup_ratio of the steps and before a cosine down to
        min_lr_ratio of it.
    weight_decay: of matrices and convolutions alone, not of trained scales.
    grad_clip: the largest norm of the whole gradient.
    kl_weight, temperature: loss = kl_weight T^2 KL(teacher || student at T) + (1 - kl_weight) cross-entropy.
    dtype: "float32", or "bfloat16" for the teacher and, by autocast, the student's activations; the student's
        weights and the optimizer stay float32.
    recompute: of the student's blocks, the share that keeps less for the backward pass and computes it again.
    fp8_teacher: the teacher's projections are multiplied in e4m3.
    """

    ternary: TernaryConfig
    tokens: int
    sequence_length: int = 512
    batch_size: int = 8
    learning_rate: float = 2.5e-4
    min_lr_ratio: float = 0.1
    warmup_ratio: float = 0.02
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    kl_weight: float = 0.5
    temperature: float = 1.0
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    recompute: float = 0.0
    fp8_teacher: bool = False
    log_every: int = 10
    save_every: int = 500
    eval_every: int = 500

    def __post_init__(self) -> None:
        counts = ("tokens", "sequence_length", "batch_size", "log_every", "save_every", "eval_every")
        rules = (
            ("a positive integer", lambda v: isinstance(v, int) and v > 0, counts),
            ("a positive number", lambda v: 0 < v < math.inf, ("learning_rate", "grad_clip", "temperature")),
            (
                "a number from 0 to 1",
                lambda v: 0 <= v <= 1,
                ("min_lr_ratio", "warmup_ratio", "kl_weight", "recompute"),
            ),
            ("a number of at least 0", lambda v: 0 <= v < math.inf, ("weight_decay",)),
            ("an integer from 0 to 2^32 - 1", lambda v: isinstance(v, int) and 0 <= v < 1 << 32, ("seed",)),
            ("'float32' or 'bfloat16'", lambda v: v in ("float32", "bfloat16"), ("dtype",)),
        )
        for expected, holds, names in rules:
            for name in names:
                if not holds(value := getattr(self, name)):
                    raise ValueError(f"{name} is {value!r}, expected {expected}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.tokens_per_step)

    def learning_rate_at(self, step: int) -> float:
        """Of step 0, 1, ... steps - 1."""
        warmup = math.ceil(self.warmup_ratio * self.steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - 1 - warmup)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * (self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine)


class Distiller:
    """A run in memory: teacher, student under quantization-aware training, optimizer, step.

    teacher: a dense MambaLM; it is moved to config.device, cast to config.dtype and frozen in place.
    Writes out/metrics.jsonl and out/checkpoints.
    """

    def __init__(
        self,
        teacher: MambaLM,
        stream: TokenStream,
        config: DistillConfig,
        out: Path,
        eval_tokens: np.ndarray | None = None,
    ) -> None:
        if teacher.ternary is not None or any(quantized_layers(teacher)):
            raise ValueError("the teacher is ternary already, expected a dense model")
        if (stream.sequence_length, stream.batch_size) != (config.sequence_length, config.batch_size):
            raise ValueError("the stream's sequence_length and batch_size are not the config's")
        self.stream, self.config, self.out, self.eval_tokens = stream, config, out, eval_tokens
        self.step = 0  # steps done
        self._identity = _identity(teacher, stream, config)
        self._warned: set[str] = set()
        student = copy.deepcopy(teacher).float().requires_grad_(True).to(config.device)
        self.student = quantize_(student, config.ternary).train()
        self.student.backbone.recompute = config.recompute
        self.teacher = teacher.to(config.device, getattr(torch, config.dtype)).eval().requires_grad_(False)
        if config.fp8_teacher:
            fp8_(self.teacher)
        decayed, plain = [], []
        for name, p in self.student.named_parameters():
            exempt = name.endswith(("A_log", "weight.0.scale", "weight.0.logit"))  # these: FakeQuantize's
            (plain if p.dim() < 2 or exempt else decayed).append(p)
        groups = ((decayed, config.weight_decay), (plain, 0.0))
        groups = [{"params": params, "weight_decay": decay} for params, decay in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    def train(self, resume: bool = False) -> None:
        """Trains to the end. Ctrl-C and SIGTERM end it after the step in hand, with a checkpoint.

        resume: go on from the last checkpoint in `out`, bit for bit on the CPU; without one, begin.
        Raises DistillError on a loss that is not finite, a collapse, or a checkpoint of another run.
        """
        if resume:
            self._resume()
        elif runs.checkpoints(self.out):
            raise DistillError(f"{self.out} holds checkpoints: resume that run, or choose another directory")
        runs.trim_metrics(self.out, self.step)
        c, seconds, timed = self.config, 0.0, 0
        span = {"total": c.steps * c.tokens_per_step, "initial": self.step * c.tokens_per_step}
        with (
            runs.deferred_signals() as signals,
            tqdm(**span, unit="tok", unit_scale=True, disable=None) as bar,
        ):
            while self.step < c.steps:
                start = time.perf_counter()
                record = self.train_step()
                seconds, timed = seconds + time.perf_counter() - start, timed + c.tokens_per_step
                bar.update(c.tokens_per_step)
                last = self.step == c.steps
                if last or self.step == 1 or self.step % c.log_every == 0:
                    self._log(record | {"tokens_per_second": timed / seconds}, bar)
                    seconds, timed = 0.0, 0
                if self.eval_tokens is not None and (last or self.step % c.eval_every == 0):
                    nats = nats_per_token(self.student, self.eval_tokens, c.sequence_length, c.batch_size)
                    record = {"step": self.step, "tokens": record["tokens"], "eval_nats": nats}
                    runs.append_metrics(self.out, record)
                if last or signals or self.step % c.save_every == 0:
                    self.save()
                if signals:
                    name = signals[0].name
                    bar.write(
                        f"{name} after step {self.step} of {c.steps}: saved, can be resumed", sys.stderr
                    )
                    raise KeyboardInterrupt if name == "SIGINT" else SystemExit(128 + signals[0])

    def train_step(self) -> dict[str, Any]:
        """One update; the step's losses, learning rate and gradient norm."""
        c = self.config
        ids, lr = self.stream.batch(self.step).to(c.device), c.learning_rate_at(self.step)
        inputs, labels = ids[:, :-1], ids[:, 1:]
        with torch.inference_mode():
            hidden_t = training.frozen(self.teacher.backbone, inputs)
        autocast = torch.autocast(ids.device.type, torch.bfloat16, enabled=c.dtype == "bfloat16")
        with parametrize.cached():  # each weight is rounded once, for a forward that backward repeats as well
            with autocast:
                hidden_s = self.student.backbone(inputs)
                heads = _head(self.student), _head(self.teacher)
                losses = distillation_loss(hidden_s, hidden_t, *heads, labels, c.kl_weight, c.temperature)
            losses[0].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), c.grad_clip)
        loss, kl, ce, norm = torch.stack([*losses, norm]).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DistillError(
                f"step {self.step + 1}: loss {loss} (KL {kl}, CE {ce}), gradient norm {norm} not finite; "
                f"lr {lr:.3g}, batch: windows {self.stream.windows(self.step)} of the data"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        done = {"step": self.step, "tokens": self.step * c.tokens_per_step}
        return done | {"loss": loss, "kl": kl, "ce": ce, "lr": lr, "grad_norm": norm}

    def zero_ratios(self) -> dict[str, float]:
        """Share of zero codes of each ternary layer."""
        layers = quantized_layers(self.student)
        return {name: FakeQuantize.packed(layer).zero_ratio() for name, layer in layers}

    def save(self) -> None:
        """Writes a checkpoint; the last two are kept."""
        state = {"identity": self._identity, "step": self.step}
        state |= {"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        runs.save_checkpoint(self.out, self.step, state)

    def _resume(self) -> None:
        if (found := runs.load_checkpoint(self.out)) is None:
            warnings.warn(f"{self.out} holds no checkpoint: beginning at step 0", stacklevel=3)
            return
        path, state = found
        old, new = state.get("identity", {}), self._identity
        if changed := [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]:
            text = "; ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in changed)
            raise DistillError(f"{path} is of another run: {text}")
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _log(self, record: dict[str, Any], bar: tqdm) -> None:
        ratios = self.zero_ratios()
        mean, low, high = sum(ratios.values()) / len(ratios), min(ratios.values()), max(ratios.values())
        summary = {"zero_ratio_mean": mean, "zero_ratio_min": low, "zero_ratio_max": high}
        runs.append_metrics(self.out, record | summary | {"zero_ratio": ratios})
        bar.set_postfix(loss=f"{record['loss']:.3f}", zeros=f"{mean:.3f}")
        most, end = ZERO_RATIO_LIMITS[self.config.ternary.rule]
        for name, ratio in ratios.items():
            text = f"step {self.step}: {ratio:.0%} of the codes of {name} are zero, expected up to {most:.0%}"
            if ratio > end:
                raise DistillError(f"{text}: zero-ratio collapse, try a lower learning rate")
            if ratio > most and name not in self._warned:
                self._warned.add(name)
                warnings.warn(f"{text}; the run ends over {end:.0%}", stacklevel=3)


def distill(
    teacher: str | Path,
    data: str | Path,
    out: str | Path,
    config: DistillConfig,
    eval_data: str | Path | None = None,
    resume: bool = False,
) -> MambaLM:
    """Distils the dense model in directory `teacher` into a ternary one; returns it packed, in fp16.

    data, eval_data: what load_tokens reads, text by the teacher's tokenizer.json.
    out: gets the packed student, metrics.jsonl, plot.png and checkpoints/. resume: see Distiller.train.
    """
    teacher, out = Path(teacher), Path(out)
    model = MambaLM.from_pretrained(teacher, dtype=torch.float32)
    vocab, eos = model.config.vocab_size, model.config.eos_token_id
    tokens, eval_tokens = (
        None if path is None else load_tokens(path, vocab, teacher / "tokenizer.json", eos)
        for path in (data, eval_data)
    )
    stream = TokenStream(tokens, config.sequence_length, config.batch_size, config.seed)
    distiller = Distiller(model, stream, config, out, eval_tokens)
    distiller.train(resume)
    student = pack_(distiller.student).eval().half()
    student.save_pretrained(out)
    runs.plot_metrics(out, ZERO_RATIO_LIMITS[config.ternary.rule][0])
    return student


def _head(model: MambaLM) -> Tensor:
    return (model.backbone.embeddings if model.lm_head is None else model.lm_head).weight


def _identity(teacher: MambaLM, stream: TokenStream, config: DistillConfig) -> dict[str, Any]:
    """What must be the same for a run to be resumed: all that its numbers depend on."""
    weights = hashlib.sha256()
    for name, tensor in teacher.state_dict().items():
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        weights.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    free = ("device", "log_every", "save_every", "eval_every")
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    return {"teacher": weights.hexdigest()[:16], "data": stream.fingerprint()} | settings
