"""What a training run leaves in its directory (checkpoints, metrics, a plot), and how it is stopped."""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

# What reading a damaged checkpoint raises.
_DAMAGED = (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile)


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((out / "checkpoints").glob("step-*.pt"))


def save_checkpoint(out: Path, step: int, state: dict[str, Any]) -> None:
    """Writes a checkpoint whole or not at all; the last two are kept."""
    path = out / "checkpoints" / f"step-{step:09d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as file:
        torch.save(state, file)
    for old in checkpoints(out)[:-2]:
        old.unlink()


def load_checkpoint(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read; None if there is none. RuntimeError if none of them can.

    Those that cannot are renamed, so that they do not count among the last two.
    """
    for path in reversed(found := checkpoints(out)):
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load itself does not look at the checksums
                if (member := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {member}")
            state = read_checkpoint(path)
        except _DAMAGED as error:
            warnings.warn(f"{path} is damaged, going back to the one before it ({error})", stacklevel=2)
            continue
        for damaged in found[found.index(path) + 1 :]:
            damaged.rename(damaged.with_suffix(".damaged"))
        return path, state
    if found:
        raise RuntimeError(f"{out}: none of its {len(found)} checkpoints can be read")
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def save_dump(out: Path, step: int, about: dict[str, Any], state: dict[str, Any]) -> Path:
    """Writes the state before a step that failed, and a JSON file about it, whose path it returns."""
    path = out / "dumps" / f"step-{step:09d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path.with_suffix(".pt")) as file:
        torch.save(state, file)
    with _replacing(path) as file:
        file.write(json.dumps(about | {"state": path.with_suffix(".pt").name}).encode())
    return path


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as file:
        np.save(file, array)


def append_metrics(out: Path, record: dict[str, Any]) -> None:
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, without a last line that was cut off."""
    path, records = out / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def trim_metrics(out: Path, step: int) -> None:
    """Drops the records after `step`: those steps are about to be done again."""
    out.mkdir(parents=True, exist_ok=True)
    kept = [record for record in read_metrics(out) if record["step"] <= step]
    with _replacing(out / "metrics.jsonl") as file:
        file.writelines(json.dumps(record).encode() + b"\n" for record in kept)


@contextmanager
def deferred_signals() -> Iterator[list[signal.Signals]]:
    """Ctrl-C and SIGTERM only fill the list it gives; a second one acts at once. Main thread only."""
    caught: list[signal.Signals] = []
    before: dict[int, Any] = {}

    def note(number: int, _frame: Any) -> None:
        caught.append(signal.Signals(number))
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number)
            signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def plot_metrics(out: Path, alarm: float) -> None:
    """Draws plot.png from metrics.jsonl, `alarm` across the zero ratios; warns if matplotlib is missing."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        warnings.warn("plot.png needs matplotlib: pip install 'ternary-ssm[train]'", stacklevel=2)
        return
    records = read_metrics(out)
    logs, evals, counts = ([r for r in records if key in r] for key in ("loss", "eval_nats", "zero_ratio"))
    tokens = [r["tokens"] for r in logs]
    figure = Figure(figsize=(12, 9), layout="constrained")
    (losses, speed), (zeros, histogram) = figure.subplots(2, 2)
    for key, label in (("ce", "cross-entropy"), ("loss", "loss"), ("kl", "KL(teacher || student)")):
        losses.plot(tokens, [r[key] for r in logs], label=label, linewidth=1)
    if evals:
        held_out = [r["eval_nats"] for r in evals]
        losses.plot([r["tokens"] for r in evals], held_out, "k.-", label="held-out cross-entropy")
    losses.set(ylabel="nats per token", ylim=(0, None))
    losses.legend()
    speed.plot(tokens, [r["tokens_per_second"] for r in logs], linewidth=1)
    speed.set(ylabel="tokens/s", ylim=(0, None))
    _plot_zero_ratios(zeros, counts, alarm, colormaps["viridis"])
    for record, label in ((counts[0], "first"), (counts[-1], "last")):
        histogram.hist(record["zero_ratio"].values(), np.linspace(0, 1, 51), alpha=0.6, label=label)
    histogram.set(xlabel="share of zero codes", ylabel="layers")
    histogram.legend()
    for axes in (losses, zeros, speed):
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(EngFormatter())  # 100 M
        axes.grid(alpha=0.3)
    figure.savefig(out / "plot.png", dpi=120)


def _plot_zero_ratios(axes, counts: list[dict[str, Any]], alarm: float, colormap) -> None:
    """A line a layer, from the first in dark to the last in light, and their mean."""
    tokens, names = [r["tokens"] for r in counts], list(counts[-1]["zero_ratio"])
    kinds = sorted({name.rpartition(".")[2] for name in names})
    colors = colormap(np.linspace(0, 0.9, len(names)))
    axes.plot(tokens, [r["zero_ratio_mean"] for r in counts], "k", linewidth=2, label="mean over layers")
    for name, color in zip(names, colors, strict=True):
        style = ("-", "--", ":", "-.")[kinds.index(name.rpartition(".")[2]) % 4]
        label = name if len(names) <= 8 or name in (names[0], names[-1]) else None
        ratios = [r["zero_ratio"][name] for r in counts]
        axes.plot(tokens, ratios, style, color=color, label=label, linewidth=1)
    axes.axhline(alarm, color="red", linewidth=1, label="alarm")
    axes.set(ylabel="share of zero codes", ylim=(0, None))
    axes.legend(fontsize="small")


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is whole and on the disk, so that no torn one is seen."""
    temporary = path.with_name("unfinished.tmp")  # one name: the next write takes what a kill left behind
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name too
    finally:
        os.close(directory)
