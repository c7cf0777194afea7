"""How to distil: the settings of a run and the schedules that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from .config import MambaConfig, TernaryConfig

ROWS = ("z", "x", "B", "C", "dt")


@dataclass(frozen=True)
class DistillConfig:
    """How to distil. Fields that say `every` count steps.

    tokens: to train on in all, rounded up to whole steps of batch_size * sequence_length.
    init: the student begins with the weights of the teacher, or with random ones (from scratch).
    batch_size: sequences a step, over all processes.
    micro_batch_size: sequences that a process takes through the models at a time, its gradients summed over
        them; by default its whole share of the batch.
    learning_rate: the peak, after a linear warm-up over warmup_ratio of the steps and before a cosine down to
        min_lr_ratio of it.
    weight_decay: of matrices and convolutions alone, not of trained scales.
    grad_clip: the largest norm of the whole gradient.
    kl_weight, temperature: loss = kl_weight T^2 KL(teacher || student at T) + (1 - kl_weight) cross-entropy.
    hidden_weight: adds this times the mean of 1 - cos(student's, teacher's last hidden state).
    teacher_top_k: 0, or how many of the teacher's logits a token are kept on disk, so that it runs once; KL
        is then over these and one class for the rest.
    ternary_rows: the parts of in_proj that are rounded (Mamba-1 has x and z); with others left dense the
        student cannot be packed and is saved as a dense model.
    anneal_ratio: share of the steps over which the weights go linearly from latent to rounded ones.
    reset_at_documents: starts both models anew after each end of a document.
    recompute: of the student's blocks, the share that keeps less for the backward pass and computes it again.
    fp8_teacher: the teacher's projections are multiplied in e4m3.
    strategy: of several processes: "ddp", a whole student each, or "fsdp", its parameters, gradients and
        optimizer state split over them.
    dtype: "float32", or "bfloat16" for the teacher and, by autocast, the student's activations; the student's
        weights and the optimizer stay float32.
    monitor_every: when the zeros of each layer's codes are counted.
    on_collapse: "abort" ends a run with too many zeros, "reset" sets trained scales back to absmean.
    tensorboard: writes event files to tensorboard/ as well.
    """

    ternary: TernaryConfig
    tokens: int
    sequence_length: int = 512
    batch_size: int = 8
    micro_batch_size: int | None = None
    learning_rate: float = 2.5e-4
    min_lr_ratio: float = 0.1
    warmup_ratio: float = 0.02
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    kl_weight: float = 0.5
    temperature: float = 1.0
    hidden_weight: float = 0.0
    teacher_top_k: int = 0
    ternary_rows: tuple[str, ...] = ROWS
    anneal_ratio: float = 0.0
    reset_at_documents: bool = False
    recompute: float = 0.0
    fp8_teacher: bool = False
    strategy: Literal["ddp", "fsdp"] = "ddp"
    init: Literal["teacher", "random"] = "teacher"
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    log_every: int = 10
    save_every: int = 500
    eval_every: int = 500
    monitor_every: int = 10
    on_collapse: Literal["abort", "reset"] = "abort"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        counts = ("tokens", "sequence_length", "batch_size", "log_every", "save_every", "eval_every")
        ratios = ("min_lr_ratio", "warmup_ratio", "kl_weight", "anneal_ratio", "recompute")
        rules = (
            ("a positive integer", _positive, (*counts, "monitor_every")),
            ("a positive integer or none", lambda v: v is None or _positive(v), ("micro_batch_size",)),
            ("a positive number", lambda v: 0 < v < math.inf, ("learning_rate", "grad_clip", "temperature")),
            ("a number from 0 to 1", lambda v: 0 <= v <= 1, ratios),
            ("a number of at least 0", lambda v: 0 <= v < math.inf, ("weight_decay", "hidden_weight")),
            ("an integer of at least 0", lambda v: isinstance(v, int) and v >= 0, ("teacher_top_k",)),
            ("an integer from 0 to 2^32 - 1", lambda v: isinstance(v, int) and 0 <= v < 1 << 32, ("seed",)),
            ("'float32' or 'bfloat16'", lambda v: v in ("float32", "bfloat16"), ("dtype",)),
            ("'teacher' or 'random'", lambda v: v in ("teacher", "random"), ("init",)),
            ("'ddp' or 'fsdp'", lambda v: v in ("ddp", "fsdp"), ("strategy",)),
            ("'abort' or 'reset'", lambda v: v in ("abort", "reset"), ("on_collapse",)),
            (f"some of {', '.join(ROWS)}", lambda v: v and set(v) <= set(ROWS), ("ternary_rows",)),
        )
        for expected, holds, names in rules:
            for name in names:
                if not holds(value := getattr(self, name)):
                    raise ValueError(f"{name} is {value!r}, expected {expected}")
        object.__setattr__(self, "ternary_rows", tuple(name for name in ROWS if name in self.ternary_rows))
        if self.teacher_top_k and self.hidden_weight:
            raise ValueError(
                "hidden_weight needs the teacher's hidden states, teacher_top_k keeps only logits"
            )
        if self.on_collapse == "reset" and not self.ternary.trains_scales:
            raise ValueError(
                f"on_collapse is 'reset', but rule {self.ternary.rule!r} has no trained scales to set back"
            )

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

    def rounded_share_at(self, step: int) -> float:
        """Share of the rounded weight in what step 0, 1, ... computes with; the rest is the latent one."""
        return min(1.0, (step + 1) / max(1, math.ceil(self.anneal_ratio * self.steps)))

    def dense_rows(self, model: MambaConfig) -> list[slice]:
        """The rows of in_proj that stay dense."""
        inner = model.d_inner
        if model.is_mamba2:
            state = model.ngroups * model.d_state
            sizes = {"z": inner, "x": inner, "B": state, "C": state, "dt": model.nheads}
        else:
            sizes = {"x": inner, "z": inner}
        ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
        return [slice(ends[k] - n, ends[k]) for k, n in sizes.items() if k not in self.ternary_rows]


def _positive(value: object) -> bool:
    return isinstance(value, int) and value > 0
