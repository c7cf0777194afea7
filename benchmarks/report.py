"""Writes the tables of the README and the docs, and the plots, from the committed JSON files.

    python benchmarks/report.py

A table stands between <!-- NAME --> and <!-- /NAME -->; the plots lie beside their files.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/training.md", "docs/kernels_ssd.md", "docs/kernels_decode.md")
PAGES = tuple(ROOT / page for page in (*PAGES, "recipes/mamba2-1.3b/README.md"))
OPS, MODEL, SCAN, TRAINING = (RESULTS / f"h200_{name}.json" for name in ("ops", "model", "scan", "training"))
PROOF = ROOT / "recipes/mamba2-1.3b/results/proof.json"
STUDY = ROOT / "recipes/tiny-english/results/study.json"
ROWS = (1, 8, 16, 64, 128, 256, 512, 1024, 4096)  # of the table of products
BATCHES = (1, 8, 64, 256)
LIBRARIES = {"ternary_ssm": "-", "mamba_ssm": "--"}  # and their lines
LOSSES = {None: "not trained", 0.0: "cross-entropy", 1.0: "KL", 0.5: "half KL, half cross-entropy"}


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * lines[0].count(" | ") + "---|", *lines[1:]])


def figure(value: float | None) -> str:
    """Three digits, or nothing."""
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ops(records: list[dict]) -> str:
    """Microseconds over rows of x."""
    times = {(r["op"], r["impl"], r["m"]): r["median_us"] for r in records}
    impls = list(dict.fromkeys(r["impl"] for r in records))
    rows = [
        (f"{name} {impl}", *(figure(times.get((f"gemm 1.3b {name}", impl, m))) for m in ROWS))
        for name in ("in_proj", "out_proj")
        for impl in impls
    ]
    return table(["us, 1.3b", *(f"M = {m}" for m in ROWS)], rows)


def _models(
    records: list[dict], bench: str, column: Callable[[dict], object], columns: list, head: str
) -> str:
    """A row a model and way of running it, milliseconds by column."""
    times: dict[tuple, dict] = {}
    for r in (r for r in records if r["bench"] == bench):
        types = f"{r['state_dtype']} state, {r['head_dtype']} head" if r["head_dtype"] else r["state_dtype"]
        times.setdefault((r["model"], r["impl"], r["mode"], types), {})[column(r)] = r["median_ms"]
    rows = [(*key, *(figure(found.get(c)) for c in columns)) for key, found in times.items()]
    return table(["model", "", "", head, *columns], rows)


def decode(records: list[dict]) -> str:
    """By CUDA graph, as generate does it."""
    records = [r for r in records if r["mode"] == "graph"]
    found = {r["batch"] for r in records if r["bench"] == "decode"}
    batches = [b for b in BATCHES if b in found]
    return _models(records, "decode", lambda r: r["batch"], batches, "ms a step, by batch")


def prefill(records: list[dict]) -> str:
    records = [r for r in records if r["mode"] == "graph"]
    shapes = sorted({(r["batch"], r["length"]) for r in records if r["bench"] == "prefill"})
    return _models(records, "prefill", lambda r: (r["batch"], r["length"]), shapes, "ms, by batch and length")


def scan(records: list[dict]) -> str:
    parts = []
    for bench in ("ssd", "scan", "step"):
        shapes = sorted({(r["batch"], r["length"]) for r in records if r["bench"] == bench})
        shapes = [s for s in shapes if s[1] > 1 or s[0] in BATCHES]
        parts.append(_models(records, bench, lambda r: (r["batch"], r["length"]), shapes, f"{bench}, ms"))
    return "\n\n".join(parts)


def states(records: list[dict]) -> str:
    rows = [
        (
            r["state_dtype"],
            *(f"{r[name]:.4f}" for name in ("nats", "whole_nats")),
            *(f"{r[name]:.1e}" for name in ("kl", "kl_begin", "kl_end")),
        )
        for r in records
    ]
    r = records[0]
    first = f"states ({r['batch']} x {r['length']:,} tokens, {r['dtype']})"
    head = (first, "nats a token", "whole sequence", "KL", "KL, first 1/16", "KL, last 1/16")
    return table(head, rows)


def rates(records: list[dict]) -> str:
    """Tokens a second; of ours the share of what bytes and products alone would allow, over llama.cpp's."""
    kinds = list(dict.fromkeys((r["bench"], r["batch"], r["length"]) for r in records))
    found = {(r["model"], r["impl"], r["bench"], r["batch"], r["length"]): r for r in records}

    def cell(model: str, impl: str, kind: tuple) -> str:
        if (r := found.get((model, impl, *kind))) is None:
            return ""
        text = f"{r['tokens_per_second']:,.0f}"
        if impl != "ternary_ssm":
            return text
        peer = found.get((model, "llama.cpp", *kind))
        times = f", {r['tokens_per_second'] / peer['tokens_per_second']:.2f}x" if peer else ""
        return f"{text} ({r['floor_ms'] / r['median_ms']:.0%}{times})"

    rows = [
        (model, impl, types, *(cell(model, impl, kind) for kind in kinds))
        for model, impl, types in dict.fromkeys(
            (r["model"], r["impl"], f"{r['activations']}, {r['head_dtype']} head") for r in records
        )
    ]
    names = (f"{bench} {batch} x {length}" for bench, batch, length in kinds)
    return table(["tokens/s (of the roofline, llama.cpp's)", "", "", *names], rows)


def loading(records: list[dict]) -> str:
    head = (
        "model",
        "file, MB",
        "loaded, ms",
        "first token, ms",
        "resident, MB",
        "states, MB",
        "without, of the file",
    )
    rows = [
        (
            *(r["model"], figure(r["file_mb"]), figure(r["load_ms"])),
            f"{r['first_token_ms']:,.0f} (least {r['first_token_min_ms']:,.0f})",
            *(figure(r["resident_mb"]), figure(r["states_mb"]), f"{r['resident_ratio']:.2f}"),
        )
        for r in records
    ]
    return table(head, rows)


def training(records: list[dict]) -> str:
    """efficiency: tokens a second and GPU over those of one GPU with as many sequences, if known."""

    def key(r: dict) -> tuple:
        return r["model"], r["batch"] // r["gpus"], r["length"], r["recompute"], r["fp8_teacher"]

    single = {key(r): r["tokens_per_second"] for r in records if r["gpus"] == 1}
    several, watched = any(r["gpus"] > 1 for r in records), any("monitor" in r for r in records)
    head = ["model", "GPUs", "batch a GPU", "teacher", "recompute", "tokens/s", "ms a step", "peak GB a GPU"]
    rows = []
    for r in records:
        row = [r["model"], f"{r['gpus']} {r['strategy']}", f"{r['batch'] // r['gpus']} x {r['length']:,}"]
        row += ["fp8" if r["fp8_teacher"] else "bf16", r["recompute"], f"{r['tokens_per_second']:,.0f}"]
        row += [figure(r["step_ms"]), f"{r['peak_gb']:.1f}", f"{r['overhead']:.3f}"]
        if watched:
            row.append(f"{r['monitor']:.2%}" if "monitor" in r else "")
        if several:
            alone = single.get(key(r))
            row.append(f"{r['tokens_per_second'] / r['gpus'] / alone:.0%}" if alone else "")
        rows.append(row)
    head += ["overhead", *(["monitor"] if watched else []), *(["efficiency"] if several else [])]
    return table(head, rows)


def study(records: list[dict]) -> str:
    """A row a way of making the student, means and standard deviations over the seeds; and the plots."""
    found: dict[tuple, list[dict]] = {}
    for r in sorted(records, key=lambda r: (r["rule"] == "learned", r["tokens"], r["kl_weight"] or 0)):
        found.setdefault((r["rule"], r["kl_weight"], r["tokens"]), []).append(r)

    def cell(runs: list[dict], name: str, form: str) -> str:
        values = [r[name] for r in runs if name in r]
        if not values:
            return runs[0]["error"].split(":")[0]
        spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}" + spread

    rows = [
        (
            *("teacher" if rule == "dense" else rule, LOSSES[weight] if rule != "dense" else ""),
            *(f"{tokens / 1e6:g} M" if tokens else "", len(runs) if tokens else ""),
            *(cell(runs, name, form) for name, form in (("nats", ".3f"), ("perplexity", ".0f"))),
            *(cell(runs, "accuracy", ".1%"), cell(runs, "zero_ratio", ".2f") if tokens else ""),
        )
        for (rule, weight, tokens), runs in sorted(found.items(), key=lambda item: item[0][0] != "dense")
    ]
    head = (
        "scales",
        "loss",
        "tokens",
        "seeds",
        "held-out nats/token",
        "LAMBADA perplexity",
        "accuracy",
        "zeros",
    )
    plots = (
        ("study_zero_ratios", "share of zero codes"),
        ("study_scales", "trained scales and their gradient"),
    )
    links = [f"![{text}](../{(STUDY.parent / name).relative_to(ROOT)}.png)" for name, text in plots]
    return "\n\n".join([table(head, rows), *links])


def proof(records: list[dict]) -> str:
    (r,) = records
    loss, seconds = r["losses"], r["seconds"]
    rows = [
        ("parameters, bytes of the teacher", f"{r['parameters']:,}, {r['teacher_bytes']:,}"),
        ("a step, steps", f"{r['batch_size']} x {r['length']:,} tokens, {r['steps']}"),
        ("tokens/s, median of the steps", f"{r['tokens_per_second']:,.0f}"),
        ("killed after step, gone on after", f"{r['killed_after_step']}, {r['resumed_after_step']}"),
        (
            "steps done twice, largest difference of their losses",
            f"{r['steps_done_twice']}, {r['difference']:.1e}",
        ),
        ("loss", ", ".join(f"{value:.4f} at step {step}" for step, value in loss.items())),
        (
            "a checkpoint",
            f"{r['checkpoint_bytes']:,} bytes, written in {seconds['checkpoint written']:.1f} s",
        ),
        ("packed student", f"{r['student_bytes']:,} bytes"),
        ("32 tokens from it", f"{r['characters_generated']} characters; {r['generate_says']}"),
        ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())),
    ]
    return table(("", ""), rows)


TABLES = {
    "ops": (OPS, ops),
    "decode": (MODEL, decode),
    "prefill": (MODEL, prefill),
    "scan": (SCAN, scan),
    "states": (RESULTS / "h200_states.json", states),
    "cpu_a16": (RESULTS / "cpu_model_a16.json", rates),
    "cpu_a8": (RESULTS / "cpu_model_a8.json", rates),
    "cpu_load": (RESULTS / "cpu_load.json", loading),
    "training": (TRAINING, training),
    "training_monitor": (RESULTS / "h200_training_monitor.json", training),
    "training_bf16": (RESULTS / "h200_training_bf16.json", training),
    "training_gpus": (RESULTS / "h200x2_training.json", training),
    "study": (STUDY, study),
    "proof": (PROOF, proof),
}


def with_tables(text: str, tables: dict[str, tuple[Path, Callable[[list[dict]], str]]] = TABLES) -> str:
    """The text with every table that it has a place and a file for. KeyError on an unknown place."""

    def fill(match: re.Match) -> str:
        path, make = tables[match[1]]
        if not path.exists():
            return match[0]
        data = json.loads(path.read_text())
        head = data["header"]
        commit = head["commit"].removesuffix("-dirty")[:7]
        device = head["device"] + (f", {head['isa']}, {head['threads']} threads" if "isa" in head else "")
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        origin = f"{device}, {head['date'][:10]}, after {commit}, `{name}`:"
        return f"<!-- {match[1]} -->\n{origin}\n\n{make(data['records'])}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", fill, text, flags=re.DOTALL)


def plot_ops(path: Path) -> None:
    """Microseconds over rows, a panel a shape, above the roofline of what the device reads and multiplies."""
    import matplotlib.pyplot as plt

    data = json.loads(path.read_text())
    head, records = data["header"], data["records"]
    names = list(dict.fromkeys(r["op"] for r in records))
    _, axes = plt.subplots(1, len(names), figsize=(4.5 * len(names), 4), sharey=True, layout="constrained")
    for axis, name in zip(axes if len(names) > 1 else [axes], names, strict=True):
        mine = [r for r in records if r["op"] == name]
        for impl in dict.fromkeys(r["impl"] for r in mine):
            points = sorted((r["m"], r["median_us"]) for r in mine if r["impl"] == impl)
            axis.loglog(*zip(*points, strict=True), marker=".", label=impl)
        ours = sorted((r for r in mine if r["impl"] == "ternary_ssm"), key=lambda r: r["m"])
        roof = [
            max(r["bytes"] / head["read_bytes_per_s"], r["flops"] / head["product_flops_per_s"]) * 1e6
            for r in ours
        ]
        axis.loglog([r["m"] for r in ours], roof, "k:", label="roofline, 2 bits a weight")
        axis.set(title=f"{name} [{mine[0]['n']}, {mine[0]['k']}]", xlabel="rows of x")
        axis.grid(alpha=0.3)
    (axes if len(names) == 1 else axes[0]).set_ylabel("us")
    (axes if len(names) == 1 else axes[0]).legend(fontsize="small")
    plt.suptitle(head["device"])
    plt.savefig(path.with_suffix(".png"), dpi=110)
    plt.close()


def plot_decode(path: Path) -> None:
    """Milliseconds a step over the batch, by CUDA graph, a panel a generation."""
    import matplotlib.pyplot as plt

    data = json.loads(path.read_text())
    lines: dict[tuple[str, str], dict[tuple, list]] = {}
    for r in (r for r in data["records"] if r["bench"] == "decode" and r["mode"] == "graph"):
        types = r["state_dtype"], r["head_dtype"]
        found = lines.setdefault((r["model"], r["impl"]), {})
        found.setdefault(types, []).append((r["batch"], r["median_ms"]))
    colors = {model: f"C{i}" for i, model in enumerate(dict.fromkeys(model for model, _ in lines))}
    names = [g for g in ("mamba2-", "mamba-") if any(model.startswith(g) for model, _ in lines)]
    size = (5.5 * len(names), 4.5)
    _, axes = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, generation in zip(axes[0], names, strict=True):
        axis.set(title=generation.rstrip("-"), xlabel="batch", ylabel="ms a step")
        axis.grid(alpha=0.3)
        for (model, impl), by_types in lines.items():
            if model.startswith(generation):
                points = sorted(next(iter(by_types.values())))
                style = {"linestyle": LIBRARIES[impl], "color": colors[model], "marker": "."}
                axis.loglog(*zip(*points, strict=True), label=f"{model} {impl}", **style)
                axis.legend(fontsize="x-small")
    plt.suptitle(data["header"]["device"])
    plt.savefig(path.with_name(path.stem + "_decode.png"), dpi=110)
    plt.close()


def plot_study(path: Path) -> None:
    """The zeros of each layer under trained and absmean scales, and what the gradient does to these."""
    import matplotlib.pyplot as plt

    curves = {r["rule"]: r["curve"] for r in json.loads(path.read_text())["records"] if "curve" in r}
    zeros = [("zero_ratio", f"{rule} scales: share of zero codes", rule) for rule in ("learned", "absmean")]
    scales = [
        ("scale", "mean scale over that at the beginning", "learned"),
        ("scale_gradient", "mean d loss / d scale", "learned"),
        ("scale_rises", "share of groups where that is negative", "learned"),
    ]
    for name, panels in (("zero_ratios", zeros), ("scales", scales)):
        _, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), layout="constrained")
        for axis, (key, title, rule) in zip(axes, panels, strict=True):
            curve = curves.get(rule, [])
            tokens = [point["tokens"] / 1e6 for point in curve]
            layers = list(curve[0]["zero_ratio"]) if curve else []
            for i, layer in enumerate(layers):
                style = {"linestyle": "-" if layer.endswith("in_proj") else "--", "linewidth": 0.8}
                style |= {"color": plt.colormaps["viridis"](0.9 * i / len(layers))}
                label = layer.removeprefix("backbone.") if i < 2 or i >= len(layers) - 2 else None
                axis.plot(tokens, [point[key][layer] for point in curve], label=label, **style)
            means = [statistics.mean(point[key].values()) for point in curve]
            axis.plot(tokens, means, "k", linewidth=2, label="mean over layers")
            axis.set(title=title, xlabel="tokens (millions)")
            axis.grid(alpha=0.3)
            if key in ("zero_ratio", "scale_rises"):
                axis.set_ylim(0, 1)
            elif key == "scale_gradient":
                axis.set_yscale("symlog", linthresh=1e-4)
        axes[0].legend(fontsize="x-small")
        plt.savefig(path.with_name(f"{path.stem}_{name}.png"), dpi=110)
        plt.close()


def main() -> None:
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
    for path, plot in ((OPS, plot_ops), (MODEL, plot_decode), (STUDY, plot_study)):
        if path.exists():
            plot(path)


if __name__ == "__main__":
    main()
