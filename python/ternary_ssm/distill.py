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
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize
from tqdm import tqdm

from . import runs
from .config import TernaryConfig
from .data import TokenStream, load_tokens
from .evaluate import nats_per_token
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
    log_every: int = 10
    save_every: int = 500
    eval_every: int = 500

    def __post_init__(self) -> None:
        counts = ("tokens", "sequence_length", "batch_size", "log_every", "save_every", "eval_every")
        rules = (
            ("a positive integer", lambda v: isinstance(v, int) and v > 0, counts),
            ("a positive number", lambda v: 0 < v < math.inf, ("learning_rate", "grad_clip", "temperature")),
            ("a number from 0 to 1", lambda v: 0 <= v <= 1, ("min_lr_ratio", "warmup_ratio", "kl_weight")),
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


def distillation_loss(
    hidden_s: Tensor,
    hidden_t: Tensor,
    head_s: Tensor,
    head_t: Tensor,
    labels: Tensor,
    kl_weight: float = 0.5,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, KL, CE), means over labels [...]: loss = kl_weight T^2 KL + (1 - kl_weight) CE.

    KL = KL(softmax(teacher / T) || softmax(student / T)), in nats. hidden [..., d] and head [v, d], where the
    two d may differ; a label is the token that follows its position. Only loss has a gradient, to hidden_s
    and head_s. Logits exist for `chunk` positions at a time, never for the whole batch.
    """
    if head_s.shape[0] != head_t.shape[0]:
        raise ValueError(f"the student has {head_s.shape[0]} logits, the teacher {head_t.shape[0]}")
    student, teacher = (hidden_s.flatten(0, -2), head_s), (hidden_t.flatten(0, -2), head_t)
    return _ChunkedLoss.apply(*student, *teacher, labels.flatten(), kl_weight, temperature, chunk)


class _ChunkedLoss(torch.autograd.Function):
    """Takes the gradient of each chunk while its logits are at hand: none are kept or computed twice."""

    @staticmethod
    def forward(ctx, x, head_s, hidden_t, head_t, labels, kl_weight, T, chunk):
        kind, acc = x.device.type, torch.promote_types(x.dtype, torch.float32)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        w = head_s.to(dtype)
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(head_s, dtype=acc)
        kl, ce = torch.zeros(2, dtype=acc, device=x.device)
        for begin in range(0, len(labels), chunk):
            rows = slice(begin, begin + chunk)
            chunk_x, target = x[rows].to(dtype), labels[rows].unsqueeze(1)
            logits = F.linear(chunk_x, w).to(acc)
            log_t = (F.linear(hidden_t[rows], head_t).to(acc) / T).log_softmax(-1)
            log_s = logits.log_softmax(-1)
            soft_s = log_s if T == 1 else (logits / T).log_softmax(-1)
            p_t = log_t.exp()
            kl += (p_t * (log_t - soft_s)).sum()
            ce -= log_s.gather(1, target).sum()
            # d loss / d logits = kl_weight T (soft_s - p_t) + (1 - kl_weight) (p_s - one-hot)
            grad = (soft_s.exp() - p_t).mul_(kl_weight * T).add_(log_s.exp(), alpha=1 - kl_weight)
            grad.scatter_add_(1, target, torch.full_like(target, kl_weight - 1, dtype=acc))
            grad = grad.to(dtype)
            grad_x[rows] = grad @ w
            grad_w += grad.T @ chunk_x
        ctx.count = len(labels)
        ctx.save_for_backward(grad_x, grad_w)
        kl, ce = kl / ctx.count, ce / ctx.count
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * T**2 * kl + (1 - kl_weight) * ce, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _kl, _ce):
        grad_x, grad_w = ctx.saved_tensors
        scale = grad_loss / ctx.count
        return grad_x * scale, grad_w * scale, None, None, None, None, None, None


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
        self.teacher = teacher.to(config.device, getattr(torch, config.dtype)).eval().requires_grad_(False)
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
            hidden_t = self.teacher.backbone(inputs)
        autocast = torch.autocast(ids.device.type, torch.bfloat16, enabled=c.dtype == "bfloat16")
        with autocast, parametrize.cached():  # cached: each weight is rounded once
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
