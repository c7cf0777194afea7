"""The benchmarks run on a CPU, and the README shows what the committed JSON files say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FIELDS = ["bench", "impl", "mode", "model", "batch", "length", "state_dtype", "head_dtype", "activations"]
FIELDS += ["median_ms", "p10_ms", "p90_ms", "peak_mb", "floor_ms", "tokens_per_second"]


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def tiny(monkeypatch):
    """Models that are quick to run, and short clocks."""
    import latency_model
    import latency_scan
    import records
    import timing

    sizes = {"mamba2-tiny": ("Mamba2", 256, 2), "mamba-tiny": ("Mamba1", 256, 2)}
    for module in (timing, latency_model, latency_scan):
        monkeypatch.setattr(module, "MODELS", sizes)
    for module, name in ((latency_model, "PREFILLS"), (latency_scan, "LENGTHS")):
        monkeypatch.setattr(module, name, {"cpu": [(1, 16), (2, 8)]})
    monkeypatch.setattr(records, "time_cpu", lambda run, seconds: [call() is None or 1.0 for call in run * 2])
    monkeypatch.setattr(timing, "ceilings", lambda device: (1e10, 1e11))
    monkeypatch.setattr(records, "TURN", 0)
    monkeypatch.setattr(latency_model, "VOCAB", 500)


def run(monkeypatch, tmp_path, *arguments: str) -> list[dict]:
    import latency

    out = tmp_path / "records.json"
    monkeypatch.setattr(sys, "argv", ["latency.py", *arguments, "--device", "cpu", "--out", str(out)])
    latency.main()
    data = json.loads(out.read_text())
    assert data["header"]["threads"] == torch.get_num_threads() and data["header"]["read_bytes_per_s"] == 1e10
    return data["records"]


@pytest.mark.usefixtures("tiny")
def test_model_with_rounded_activations(monkeypatch, tmp_path):
    options = "--models mamba2 --heads int8 --bench decode --activations a8 --no-peers"
    found = run(monkeypatch, tmp_path, "model", *options.split())
    assert {r["activations"] for r in found} == {"a8"}
    assert all(r["tokens_per_second"] == r["batch"] * r["length"] / r["median_ms"] * 1e3 for r in found)


@pytest.mark.usefixtures("tiny")
def test_model(monkeypatch, tmp_path):
    found = run(
        monkeypatch,
        tmp_path,
        "model",
        "--models",
        "tiny",
        "--heads",
        "float,int8,ternary",
        "--states",
        "fp32,bf16",
    )
    ours = [r for r in found if r["impl"] == "ternary_ssm"]
    assert all(list(r) == FIELDS for r in found)
    for model in ("mamba2-tiny", "mamba-tiny"):
        cases = {
            (r["bench"], r["batch"], r["length"], r["state_dtype"], r["head_dtype"])
            for r in ours
            if r["model"] == model
        }
        decode = {("decode", b, 1, state) for b in (1, 8) for state in ("fp32", "bf16")}
        prefill = {("prefill", 1, 16, "fp32"), ("prefill", 2, 8, "fp32")}
        assert cases == {(*case, head) for case in decode | prefill for head in ("fp32", "int8", "ternary")}
    floors = {(r["model"], r["batch"], r["state_dtype"], r["head_dtype"]): r["floor_ms"] for r in ours[:4]}
    assert len(set(floors.values())) == 4 and min(floors.values()) > 0


@pytest.mark.usefixtures("tiny")
def test_the_floor_is_what_the_shapes_say():
    import latency_model

    from ternary_ssm import TernaryConfig

    config = latency_model.config_of("mamba2-tiny")
    model = latency_model.random_model(config, TernaryConfig(), "cpu", torch.float16)
    size, flops = latency_model.work(model, config, "decode", 3, 1, 4, 2)
    d, n, h, c = 256, 2 * 512 + 2 * 128 + 8, 8, 512 + 256
    codes, scales = (n * d + 2 * d * d) // 4, 2 * (n * d + 2 * d * d) // 128
    small = 2 * d + 2 * c * 5 + 4 * h * 3 + 2 * 512  # norm, convolution, dynamics, gated norm
    table = 2 * 504 * d
    states = 2 * 3 * (4 * h * 64 * 128 + 2 * 3 * c)
    assert size == 2 * (codes + scales + small + states) + 2 * d + table
    assert flops == 2 * 3 * (2 * (n * d + 2 * d * d) + 504 * d)
    with torch.no_grad():
        assert 0.1 < model(torch.arange(12).reshape(2, 6)).logits.float().std() < 100


@pytest.mark.usefixtures("tiny")
def test_load(monkeypatch, tmp_path):
    (found,) = run(monkeypatch, tmp_path, "load", "--models", "mamba2-tiny", "--rounds", "1")
    assert 0 < found["load_ms"] < found["first_token_ms"] == found["first_token_min_ms"]
    assert found["states_mb"] == pytest.approx(2 * (512 * 128 * 4 + 3 * 768 * 4) / 1e6)
    assert found["resident_ratio"] == (found["resident_mb"] - found["states_mb"]) / found["file_mb"]


def test_measuring_in_turn(monkeypatch):
    import records

    monkeypatch.setattr(records, "TURN", 0)
    calls = []
    found = records.measure_in_turn([[lambda: calls.append("a")], [lambda: calls.append("b")]], rounds=3)
    assert "".join(calls) == "ab" * 4
    assert all(p10 <= median <= p90 and peak is None for median, p10, p90, peak in found)


@pytest.mark.usefixtures("tiny")
def test_scan(monkeypatch, tmp_path):
    found = run(monkeypatch, tmp_path, "scan", "--models", "tiny", "--states", "fp32,bf16")
    assert all(list(r) == FIELDS for r in found)
    cases = {(r["bench"], r["model"]) for r in found}
    steps = {("step", "mamba2-tiny"), ("step", "mamba-tiny")}
    assert cases == steps | {("ssd", "mamba2-tiny"), ("scan", "mamba-tiny")}
    assert len(found) == 2 * (2 + 4)


def test_ops(monkeypatch, tmp_path):
    import timing

    monkeypatch.setattr(timing, "ceilings", lambda device: (1e10, 1e11))
    monkeypatch.setattr("timing.ROTATED_BYTES", {"cpu": 1})
    monkeypatch.setattr("latency_ops.time_cpu", lambda run: [call() is None or 1.0 for call in run * 2])
    found = run(monkeypatch, tmp_path, "ops", "--models", "130m", "--rows", "1,2")
    assert {(r["op"], r["impl"], r["m"]) for r in found} == {
        (f"gemm 130m {name}", impl, m)
        for name in ("in_proj", "out_proj")
        for impl in ("ternary_ssm", "torch fp32")
        for m in (1, 2)
    }


def test_training(monkeypatch, tmp_path):
    import timing
    import training

    sizes = {"mamba2-tiny": ("Mamba2", 256, 2), "mamba-tiny": ("Mamba1", 256, 2)}
    monkeypatch.setattr(timing, "MODELS", sizes)
    monkeypatch.setattr(training, "MODELS", sizes)
    monkeypatch.setattr(training, "VOCAB", 500)
    monkeypatch.setattr(timing, "ceilings", lambda device: (1e10, 1e11))
    out = tmp_path / "training.json"
    arguments = "--models tiny --batch 2 --length 16 --steps 2 --recompute 0,1 --fp8-teacher --device cpu"
    monkeypatch.setattr(sys, "argv", ["training.py", *arguments.split(), "--out", str(out)])
    training.main()
    data = json.loads(out.read_text())
    assert data["header"]["threads"] == torch.get_num_threads()
    cases = [(r["bench"], r["model"], r["gpus"], r["strategy"], r["recompute"]) for r in data["records"]]
    assert cases == [("training", name, 1, "single", share) for name in sizes for share in (0, 1)]
    parts = ["teacher", "fake_quantize", "student_forward", "loss", "backward", "optimizer"]
    for r in data["records"]:
        assert r["tokens_per_second"] == pytest.approx(32 / r["step_ms"] * 1e3) and r["peak_gb"] is None
        assert list(r["parts_ms"]) == parts and min(r["parts_ms"].values()) > 0 and r["overhead"] > 0


RUN_TRAINING = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import timing, training
timing.MODELS = training.MODELS = {"mamba2-tiny": ("Mamba2", 128, 2)}
timing.ceilings, training.VOCAB = (lambda device: (1e10, 1e11)), 500
training.main()
"""


def test_training_on_two_processes(tmp_path):
    """Added to the record of one; the table then has the efficiency."""
    import report

    script, out = tmp_path / "run.py", tmp_path / "training.json"
    script.write_text(RUN_TRAINING)
    one = {"model": "mamba2-tiny", "gpus": 1, "strategy": "single", "batch": 2, "length": 16}
    one |= {"recompute": 0.0, "fp8_teacher": False, "tokens_per_second": 10.0, "step_ms": 3200.0}
    out.write_text(json.dumps({"records": [one | {"overhead": 1.0}]}))
    options = (
        "--models tiny --batch 2 --length 16 --steps 2 --recompute 0 --device cpu --strategy fsdp --append"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, script, ROOT / "benchmarks", *options.split(), "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tok/s") == 1  # one of them speaks
    kept, new = json.loads(out.read_text())["records"]
    assert kept == one | {"overhead": 1.0}
    assert (new["gpus"], new["strategy"], new["batch"], new["parts_ms"]) == (2, "fsdp", 4, {})
    assert new["tokens_per_second"] == pytest.approx(64 / new["step_ms"] * 1e3) and new["overhead"] > 0
    kept["peak_gb"] = new["peak_gb"] = 1.0
    head, _, *rows = report.training([kept, new]).splitlines()
    shares = ("100%", f"{new['tokens_per_second'] / 20:.0%}")
    assert head.endswith("| efficiency |")
    assert all(row.endswith(f"| {share} |") for row, share in zip(rows, shares, strict=True))
    assert "efficiency" not in report.training([kept])


def test_unknown_models_are_refused():
    command = [sys.executable, ROOT / "benchmarks" / "latency.py", "model", "--models", "mamba3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "--models mamba3: expected parts of mamba2-130m" in result.stderr


@pytest.mark.usefixtures("tiny")
def test_llama_cpp(tmp_path):
    pytest.importorskip("llama_cpp")
    import latency_model

    from ternary_ssm import TernaryConfig

    config = latency_model.config_of("mamba2-tiny")
    model = latency_model.random_model(config, TernaryConfig(group_size=256), "cpu", torch.float16)
    build = latency_model.llama_cpp(model, str(tmp_path))
    for bench, length in (("decode", 1), ("prefill", 16)):
        (call,), dtype = build(bench, 1, length, torch.float32, "eager")
        call()
        call()
        assert dtype == torch.float32


@pytest.mark.parametrize(
    "page, name",
    [
        ("README.md", "ops"),
        *(("docs/training.md", name) for name in ("training", "training_gpus", "study")),
        ("recipes/mamba2-1.3b/README.md", "proof"),
    ],
)
def test_the_pages_are_up_to_date(page, name):
    import report

    text = (ROOT / page).read_text()
    assert f"<!-- {name} -->" in text and ROOT / page in report.PAGES
    assert report.with_tables(text) == text, "run python benchmarks/report.py"


def test_a_place_without_its_file_stays(tmp_path):
    import report

    text = "<!-- a -->\n<!-- /a -->\n"
    assert report.with_tables(text, {"a": (tmp_path / "none.json", report.proof)}) == text
    with pytest.raises(KeyError):
        report.with_tables(text, {})


def test_tables_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    import report

    def record(bench, model, impl, batch, length, ms):
        values = (bench, impl, "graph", model, batch, length, "fp32", "fp16", "fp16", ms, ms, ms, 1.0, 0.1)
        return dict(zip(FIELDS, (*values, batch * length / ms * 1e3), strict=True))

    records = [
        record(bench, model, impl, batch, length, batch + i)
        for bench, length in (("decode", 1), ("prefill", 512))
        for model in ("mamba2-130m", "mamba-130m")
        for i, impl in enumerate(("ternary_ssm", "mamba_ssm"))
        for batch in (1, 8)
    ]
    path = tmp_path / "h200_model.json"
    header = {"device": "a GPU", "date": "2026-11-22T21:00:00+00:00", "commit": "0123456789ab-dirty"}
    path.write_text(json.dumps({"header": header, "records": records}))
    text = "before\n<!-- decode -->\nold\n<!-- /decode -->\nafter\n<!-- prefill -->\n<!-- /prefill -->\n"
    tables = {"decode": (path, report.decode), "prefill": (path, report.prefill)}
    new = report.with_tables(text, tables)
    assert (
        new.startswith("before\n<!-- decode -->\na GPU, 2026-11-22, after 0123456, ")
        and "old" not in new
        and "\nafter\n" in new
    )
    assert "| mamba2-130m | mamba_ssm | graph | fp32 state, fp16 head | 2 | 9 |" in new
    assert report.with_tables(new, tables) == new
    report.plot_decode(path)
    report.plot_ops(Path(shutil.copy(report.OPS, tmp_path)))
    assert {p.name for p in tmp_path.glob("*.png")} == {"h200_model_decode.png", "h200_ops.png"}
