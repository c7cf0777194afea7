"""The training loop: one step over all processes, what is watched and logged, checkpoints and resuming."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import signal
import sys
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize
from tqdm import tqdm

from . import distributed, runs, training
from .config import MambaConfig
from .data import TokenStream, sequence_bounds
from .evaluate import nats_per_token
from .fp8 import fp8_
from .loss import distillation_loss
from .models import MambaLM
from .monitor import ZERO_RATIO_LIMITS, TensorBoard, first_not_finite, reset_scales_, summary
from .recipe import DistillConfig
from .rounding import Rounding
from .surgery import pack_, quantize_, quantized_layers
from .teacher_cache import TeacherCache, top_k_loss


class DistillError(RuntimeError):
    """A run that cannot go on or be resumed: where it stood, what was expected, what was found."""


class Distiller:
    """A run in memory: teacher, student under quantization-aware training, optimizer, step.

    teacher: a dense MambaLM; it is moved to config.device, cast to config.dtype and frozen in place.
    teacher_cache: where its logits are kept if config.teacher_top_k, out/teacher_cache by default.
    document_ends: the tokens that end documents, for config.reset_at_documents.
    Of several processes (distributed.session) all make one; rank 0 alone writes out/metrics.jsonl,
    out/checkpoints, out/dumps and out/tensorboard.
    """

    def __init__(
        self,
        teacher: MambaLM,
        stream: TokenStream,
        config: DistillConfig,
        out: Path,
        eval_tokens: np.ndarray | None = None,
        teacher_cache: Path | None = None,
        document_ends: tuple[int, ...] = (),
    ) -> None:
        if teacher.ternary is not None or any(quantized_layers(teacher)):
            raise ValueError("the teacher is ternary already, expected a dense model")
        if (stream.sequence_length, stream.batch_size) != (config.sequence_length, config.batch_size):
            raise ValueError("the stream's sequence_length and batch_size are not the config's")
        share, rest = divmod(config.batch_size, distributed.world())
        self._micro = config.micro_batch_size or share
        if rest or share % self._micro:
            raise ValueError(
                f"batch_size {config.batch_size} is not a multiple of {distributed.world()} processes x "
                f"{self._micro} sequences at a time"
            )
        if config.reset_at_documents and not document_ends:
            raise ValueError("reset_at_documents needs the token that ends documents, found none")
        self.stream, self.config, self.out, self.eval_tokens = stream, config, out, eval_tokens
        self.step = 0  # steps done
        self._identity = _identity(teacher, stream, config)
        self._document_ends, self._warned = document_ends, set[str]()
        self._cache, self._cache_path = None, teacher_cache or out / "teacher_cache"
        self._tensorboard: TensorBoard | None = None
        self.device = distributed.local_device(config.device)
        first = copy.deepcopy(teacher) if config.init == "teacher" else _random(teacher.config, config.seed)
        student = first.float().requires_grad_(True).to(self.device)
        self.student = quantize_(student, config.ternary).train()
        self.student.backbone.recompute = config.recompute
        self.rounding = Rounding(self.student, config.dense_rows(teacher.config))
        self._replica = distributed.replicate(self.student, config.strategy)
        self.teacher = teacher.to(self.device, getattr(torch, config.dtype)).eval().requires_grad_(False)
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

        resume: go on from the last checkpoint in `out`, bit for bit on the CPU with as many processes, to
        rounding with others; without one, begin.
        Raises DistillError on a loss that is not finite, a collapse, or a checkpoint of another run.
        """
        if resume:
            self._resume()
        elif distributed.first(lambda: bool(runs.checkpoints(self.out))):
            raise DistillError(f"{self.out} holds checkpoints: resume that run, or choose another directory")
        c, seconds, timed = self.config, 0.0, 0
        first_rank = distributed.rank() == 0
        distributed.first(self._open_logs)
        if c.teacher_top_k and self.step < c.steps:
            costs = self._fill_cache()
            self._log({"step": self.step, "tokens": self.step * c.tokens_per_step} | costs)
        span = {"total": c.steps * c.tokens_per_step, "initial": self.step * c.tokens_per_step}
        with (
            runs.deferred_signals() as signals,
            tqdm(**span, unit="tok", unit_scale=True, disable=None if first_rank else True) as bar,
        ):
            while self.step < c.steps:
                start = time.perf_counter()
                record = self.train_step()
                seconds, timed = seconds + time.perf_counter() - start, timed + c.tokens_per_step
                bar.update(c.tokens_per_step)
                last, done = self.step == c.steps, {k: record[k] for k in ("step", "tokens")}
                logged = last or self.step == 1 or self.step % c.log_every == 0
                ratios = self.rounding.ratios()
                if logged:
                    bar.set_postfix(loss=f"{record['loss']:.3f}")
                    record |= {"tokens_per_second": timed / seconds}
                    seconds, timed = 0.0, 0
                if logged or ratios:
                    self._log((record if logged else done) | (summary(ratios) if ratios else {}))
                self._watch(ratios)
                if self.eval_tokens is not None and (last or self.step % c.eval_every == 0):
                    self._log(done | {"eval_nats": self.evaluate()})
                stop = distributed.largest(signals[0] if signals else 0)
                if last or stop or self.step % c.save_every == 0:
                    self.save()
                if stop:
                    if first_rank:
                        text = f"{signal.Signals(stop).name} after step {self.step} of {c.steps}"
                        bar.write(f"{text}: saved, can be resumed", sys.stderr)
                    raise KeyboardInterrupt if stop == signal.SIGINT else SystemExit(128 + stop)

    def train_step(self) -> dict[str, Any]:
        """One update; the step's losses, learning rate and gradient norm, the same on all ranks."""
        c, number = self.config, self.step + 1
        lr = c.learning_rate_at(self.step)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        counting = number in (1, c.steps) or number % c.monitor_every == 0
        self.rounding.begin(c.rounded_share_at(self.step), counting)
        windows = self._windows(self.step)
        parts = [windows[i : i + self._micro] for i in range(0, len(windows), self._micro)]
        sums = torch.zeros(4, device=self.device)
        for part in parts:
            with distributed.summing(self._replica, last=part is parts[-1]):
                losses = self._replica(self._losses, part)
                (losses[0] / len(parts)).backward()
            sums += torch.stack(losses).detach().float()
        self.rounding.counting = False
        means = distributed.mean(sums / len(parts))
        norm = distributed.gradient_norm(parameters)
        loss, kl, ce, hidden, found = torch.stack([*means, norm]).tolist()
        if not (math.isfinite(loss) and math.isfinite(found)):
            self._stop(
                f"loss {loss} (KL {kl}, CE {ce}), gradient norm {found} not finite; lr {lr:.3g}", parts
            )
        torch.nn.utils.clip_grads_with_norm_(parameters, c.grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step = number
        record = {"step": number, "tokens": number * c.tokens_per_step, "loss": loss, "kl": kl, "ce": ce}
        return record | ({"hidden": hidden} if c.hidden_weight else {}) | {"lr": lr, "grad_norm": found}

    @torch.no_grad()
    def evaluate(self) -> float:
        """nats_per_token of the eval tokens, each rank its share of the windows. All ranks must call it."""
        c, tokens, world, rank = self.config, self.eval_tokens, distributed.world(), distributed.rank()
        share = (len(tokens) - 1) // c.sequence_length // world * c.sequence_length  # predicted by each rank
        pieces = [tokens[rank * share : (rank + 1) * share + 1]] if share else []
        if world * share < len(tokens) - 1:
            pieces.append(tokens[world * share :])  # what is left over, on every rank
        total = 0.0
        for piece in pieces:
            nats = self._replica(nats_per_token, piece, c.sequence_length, c.batch_size)
            total += nats * (len(piece) - 1) * (world if piece is pieces[0] and share else 1)
        return sum(distributed.gather_objects(total)) / world / (len(tokens) - 1)

    def save(self) -> None:
        """Writes a checkpoint; the last two are kept. All ranks must call it."""
        state = self._state()
        distributed.first(lambda: runs.save_checkpoint(self.out, self.step, state))

    def replay(self, dump: Path) -> dict[str, Any]:
        """Does the step again before which a dump was written, and gives its record if it is finite now."""
        about = json.loads(Path(dump).read_text())
        state = runs.read_checkpoint(Path(dump).with_name(about["state"]))
        self._load(state, dump)
        torch.set_rng_state(state["rng"])
        if self.config.teacher_top_k:
            self._fill_cache()
        return self.train_step()

    def packed(self) -> MambaLM | None:
        """The student for inference, in fp16, on rank 0; None on others. The run cannot go on after it.

        One whose in_proj is ternary in some rows only has no packed form, nor have values of the rule
        "shifted": it is a dense model of the values.
        """
        student, config = self.student, self.config
        self.rounding.share = 1.0
        if distributed.world() > 1:  # out of DDP's and FSDP's hands
            state = distributed.whole(student.state_dict())
            if distributed.rank():
                return None
            student = quantize_(MambaLM(student.config), config.ternary)
            student.load_state_dict(state)
            Rounding(student, config.dense_rows(student.config))
        if config.dense_rows(student.config) or not config.ternary.packs:
            for _, layer in list(quantized_layers(student)):
                parametrize.remove_parametrizations(layer, "weight")
        else:
            pack_(student)
        return student.eval().half()

    def _windows(self, step: int) -> list[int]:
        """This rank's."""
        windows = self.stream.windows(step)
        share = len(windows) // distributed.world()
        return windows[distributed.rank() * share :][:share]

    def _losses(self, student: MambaLM, windows: list[int]) -> tuple[Tensor, ...]:
        """(loss, KL, CE, mean 1 - cos of the hidden states), means over the windows' tokens."""
        c, ids = self.config, self.stream.rows(windows)
        labels = ids[:, 1:].to(self.device)
        options = labels, c.kl_weight, c.temperature
        hidden_t = None if self._cache is not None else self._teach(windows)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=c.dtype == "bfloat16")
        with (
            autocast,
            parametrize.cached(),
        ):  # rounds each weight once, and again in blocks that run again
            head = student.head.weight  # tied and rounded, it is what the embedding finds in the cache
            hidden_s = student.backbone(*self._inputs(ids)).view(*labels.shape, -1)
            if hidden_t is None:
                losses = top_k_loss(hidden_s, head, *self._cache.read(windows, self.device), *options)
            else:
                losses = distillation_loss(hidden_s, hidden_t, head, self.teacher.head.weight, *options)
        if not c.hidden_weight:
            return *losses, losses[0].new_zeros(())
        distance = 1 - F.cosine_similarity(hidden_s.float(), hidden_t.float(), dim=-1).mean()
        return losses[0] + c.hidden_weight * distance, *losses[1:], distance.detach()

    def _inputs(self, ids: Tensor) -> tuple[Tensor, None, Tensor | None]:
        """The arguments of a backbone for rows [b, l + 1]: ids, cache, cu_seqlens."""
        inputs = ids[:, :-1]
        if not self.config.reset_at_documents:
            return inputs.to(self.device), None, None
        bounds = sequence_bounds(inputs, self._document_ends)
        return inputs.reshape(1, -1).to(self.device), None, bounds.to(self.device)

    @torch.no_grad()
    def _teach(self, windows: list[int]) -> Tensor:
        """The teacher's hidden states [b, l, d]."""
        inputs, backbone = self._inputs(self.stream.rows(windows)), self.teacher.backbone
        hidden = training.frozen(backbone, inputs[0]) if inputs[2] is None else backbone(*inputs)
        return hidden.view(len(windows), self.stream.sequence_length, -1)

    def _fill_cache(self) -> dict[str, float]:
        """Runs the teacher over the windows of the steps to come and lets it go. Returns what top-k costs, on
        the next batch: KL over all classes, over k + 1, and the probability of the last one."""
        c = self.config
        identity = {k: self._identity[k] for k in ("teacher", "data", "dtype", "reset_at_documents")}
        head, n = self.teacher.head.weight.detach(), self.stream.windows_per_epoch
        identity |= {"temperature": c.temperature, "vocabulary": head.shape[0]}
        cache = TeacherCache(self._cache_path, identity, n, c.sequence_length, c.teacher_top_k)
        needed = {w for step in range(self.step, c.steps) for w in self.stream.windows(step)}
        with tqdm(unit="window", desc="teacher", disable=None if distributed.rank() == 0 else True) as bar:
            cache.fill(needed, self._micro, self._teach, head, c.temperature, bar.update)
        part = self._windows(self.step)[: self._micro]
        with torch.no_grad():
            full = self._replica(self._losses, part)[1]
            self._cache = cache
            short = self._replica(self._losses, part)[1]
        rest = cache.read(part, self.device)[0][..., -1].exp().mean()
        self.teacher = None
        costs = distributed.mean(torch.stack([full, short, rest]).float()).tolist()
        return dict(zip(("kl_full", "kl_top_k", "teacher_rest"), costs, strict=True))

    def _state(self) -> dict[str, Any]:
        state = {"identity": self._identity, "step": self.step}
        state |= {"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        return distributed.whole(state)

    def _resume(self) -> None:
        loaded: list[tuple[Path, dict[str, Any]] | None] = []

        def load() -> Path | None:
            loaded.append(runs.load_checkpoint(self.out))
            return loaded[0] and loaded[0][0]

        if (path := distributed.first(load)) is None:
            if distributed.rank() == 0:
                warnings.warn(f"{self.out} holds no checkpoint: beginning at step 0", stacklevel=3)
            return
        self._load(loaded[0][1] if loaded else runs.read_checkpoint(path), path)

    def _load(self, state: dict[str, Any], path: Path) -> None:
        old, new = state.get("identity", {}), self._identity
        if changed := [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]:
            text = "; ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in changed)
            raise DistillError(f"{path} is of another run: {text}")
        distributed.load(self.student, self.optimizer, state)
        self.step = state["step"]

    def _open_logs(self) -> None:
        runs.trim_metrics(self.out, self.step)
        if self.config.tensorboard:
            self._tensorboard = TensorBoard(self.out, self.step)

    def _log(self, record: dict[str, Any]) -> None:
        if distributed.rank() == 0:
            runs.append_metrics(self.out, record)
            if self._tensorboard is not None:
                self._tensorboard.write(record)

    def _watch(self, ratios: dict[str, float]) -> None:
        """Warns of zero ratios that are too high; on a collapse ends the run or resets the scales."""
        most, end = ZERO_RATIO_LIMITS[self.config.ternary.rule]
        layers = dict(quantized_layers(self.student))
        for name, ratio in ratios.items():
            text = f"step {self.step}: {ratio:.0%} of the codes of {name} are zero, expected up to {most:.0%}"
            if ratio > end and self.config.on_collapse == "abort":
                raise DistillError(f"{text}: zero-ratio collapse, try a lower learning rate")
            if ratio > end:
                reset_scales_(layers[name], self.optimizer)
                warnings.warn(f"{text}: its scales are absmean again", stacklevel=3)
            elif ratio > most and name not in self._warned:
                self._warned.add(name)
                warnings.warn(f"{text}; over {end:.0%} is a collapse", stacklevel=3)

    def _stop(self, what: str, parts: list[list[int]]) -> NoReturn:
        """Ends the run before its update: names the tensor, the batch, and a dump to replay the step from."""
        forwards = [partial(_run, self._losses, part) for part in parts]
        tensor = first_not_finite(self._replica, self.student, forwards) or "none"
        windows, number = self.stream.windows(self.step), self.step + 1
        about = {"step": number, "windows": windows, "what": what, "first_not_finite": tensor}
        state = self._state() | {"rng": torch.get_rng_state()}
        dump = distributed.first(lambda: runs.save_dump(self.out, number, about, state))
        raise DistillError(
            f"step {number}: {what}, batch: windows {windows} of the data; first tensor that is not finite: "
            f"{tensor}; replay the step from {dump}"
        )


def _random(config: MambaConfig, seed: int) -> MambaLM:
    """A new model, the same on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MambaLM(config)


def _run(losses, windows: list[int], student: MambaLM):
    return losses(student, windows)


# Settings that may change when a run is resumed: the numbers do not depend on them, but for rounding.
_FREE = {"device", "log_every", "save_every", "eval_every", "monitor_every", "on_collapse", "tensorboard"}
_FREE |= {"micro_batch_size", "recompute", "strategy"}


def _identity(teacher: MambaLM, stream: TokenStream, config: DistillConfig) -> dict[str, Any]:
    """What must be the same for a run to be resumed: all that its numbers depend on."""
    weights = hashlib.sha256()
    for name, tensor in teacher.state_dict().items():
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        weights.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    settings = {name: value for name, value in asdict(config).items() if name not in _FREE}
    return {"teacher": weights.hexdigest()[:16], "data": stream.fingerprint()} | settings
