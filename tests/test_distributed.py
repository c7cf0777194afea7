"""Training on several processes (gloo, on the CPU): the numbers are those of one process."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from ternary_ssm import MambaLM, TernaryConfig, distributed, runs, training
from test_distill import BATCH, LENGTH, VOCAB, make_distiller, make_teacher, one_thread  # noqa: F401

STEPS = 6
# Everything that is summed over tokens or split over processes; 2 sequences at a time where there are more.
OPTIONS = {"ternary": TernaryConfig(32, "learned"), "steps": STEPS, "grad_clip": 0.5, "hidden_weight": 0.1}


def spawn(world: int, function, *args, device: str = "cpu") -> list[int | None]:
    """Runs function(*args) in `world` processes that form a group; their exit codes."""
    context = multiprocessing.get_context("forkserver")  # imports torch once, and forks from there
    context.set_forkserver_preload(["ternary_ssm.trainer", "pytest"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=enter, args=(rank, world, port, device, function, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60 if device == "cpu" else 180)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def enter(rank: int, world: int, port: int, device: str, function, args) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "localhost"} | {name: str(value) for name, value in names.items()})
    with distributed.session(device):
        function(*args)


def train(out: Path, options: dict) -> None:
    d = make_distiller(out, **OPTIONS | options)
    d.train(resume=bool(runs.checkpoints(out)))


def train_fused(out: Path, options: dict) -> None:
    """The fused form of a block, each kernel of mamba_ssm's replaced by modules that give the same."""

    def add_norm(x, residual, norm, in_fp32):
        residual = (x if residual is None else residual + x).float()
        return norm(residual), residual

    def after_projection(mixer, zxbcdt):
        mixer.in_proj.forward = lambda _: zxbcdt
        y = mixer(zxbcdt)
        del mixer.in_proj.forward
        return y

    training.is_fused, training._add_norm = lambda *_: True, add_norm
    training._norm, training._fused_mamba2 = lambda x, norm, dtype: norm(x), after_projection
    train(out, options)


def losses(out: Path) -> torch.Tensor:
    """[steps, values] of each step's log."""
    names = ("loss", "kl", "ce", "hidden", "grad_norm")
    return torch.tensor([[r.get(name, 0) for name in names] for r in runs.read_metrics(out) if "loss" in r])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("single")
    options = {"eval_tokens": np.arange(3 * LENGTH + 5) % VOCAB, "eval_every": STEPS // 2}
    train(out, options)
    return out, options


def assert_same_run(out: Path, single) -> None:
    expected, _ = single
    torch.testing.assert_close(losses(out), losses(expected), rtol=1e-4, atol=1e-6)
    found, true = (runs.load_checkpoint(path)[1] for path in (out, expected))
    assert found["identity"] == true["identity"]
    for name, weight in true["student"].items():  # Adam turns the sign of a tiny gradient into a step
        assert (found["student"][name] - weight).abs().mean() < 1e-5, name
    found, true = (
        [r["eval_nats"] for r in runs.read_metrics(p) if "eval_nats" in r] for p in (out, expected)
    )
    assert found == pytest.approx(true, rel=1e-5) and len(found) == 2


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, {"micro_batch_size": 1}),
        (1, {"recompute": 1.0}),
        (2, {"strategy": "ddp", "micro_batch_size": 1, "recompute": 1.0}),
        (2, {"strategy": "fsdp", "micro_batch_size": 1, "recompute": 1.0}),
        (4, {"strategy": "fsdp"}),
    ],
)
def test_the_numbers_are_those_of_one_process(tmp_path, single, world, options):
    options = single[1] | options
    if world == 1:
        train(tmp_path, options)
    else:
        assert spawn(world, train, tmp_path, options) == [0] * world
    assert_same_run(tmp_path, single)
    zeros = [
        [r["zero_ratio"] for r in runs.read_metrics(p) if "zero_ratio" in r] for p in (tmp_path, single[0])
    ]
    assert len(zeros[0]) == len(zeros[1])
    for found, true in zip(*zeros, strict=True):
        assert found == pytest.approx(true, abs=1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ternary_tables(tmp_path, single, strategy):
    options = single[1] | {"ternary": TernaryConfig(32, "learned", embedding="ternary")}
    train(tmp_path / "one", options)
    assert spawn(2, train, tmp_path / "two", options | {"strategy": strategy}) == [0, 0]
    assert_same_run(tmp_path / "two", (tmp_path / "one", options))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_fused_form_on_split_parameters(tmp_path, single, share):
    options = single[1] | {"strategy": "fsdp", "recompute": share}
    assert spawn(2, train_fused, tmp_path, options) == [0, 0]
    assert_same_run(tmp_path, single)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_numbers_of_two_gpus_are_those_of_one(tmp_path, strategy):
    options = {"device": "cuda", "strategy": strategy}
    train(tmp_path / "one", options)
    assert spawn(2, train, tmp_path / "two", options, device="cuda") == [0, 0]
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-3, atol=1e-5)


def interrupted(out: Path, options: dict, step: int) -> None:
    """SIGTERM reaches the last process alone, before a step."""
    d = make_distiller(out, **OPTIONS | options)
    train_step = d.train_step

    def signalled():
        if d.step == step - 1 and distributed.rank() == distributed.world() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step()

    d.train_step = signalled
    d.train(resume=bool(runs.checkpoints(out)))


def test_a_checkpoint_of_any_number_of_processes_goes_on_with_any_other(tmp_path, single):
    """A signal to one of four ends all of them after one step, amid an epoch, with a checkpoint."""
    options = single[1] | {"save_every": 100}
    stages = [(4, "ddp", 2), (2, "fsdp", 3), (1, "ddp", 5)]
    for world, strategy, step in stages:
        here = options | {"strategy": strategy}
        if world == 1:
            with pytest.raises(SystemExit) as error:
                interrupted(tmp_path, here, step)
            assert error.value.code == 143
        else:
            assert spawn(world, interrupted, tmp_path, here, step) == [143] * world
        assert runs.checkpoints(tmp_path)[-1].stem == f"step-{step:09d}"
    assert spawn(2, train, tmp_path, options | {"strategy": "fsdp"}) == [0, 0]
    assert_same_run(tmp_path, single)


def broken(out: Path) -> None:
    """A weight that is not finite, on the process that holds its rows."""
    d = make_distiller(out, strategy="fsdp")
    d.train_step()
    with torch.no_grad():
        distributed.local(d.student.backbone.norm_f.weight)[-1:] = float("nan") if distributed.rank() else 1.0
    try:
        d.train_step()
    except RuntimeError as error:
        (out / f"error-{distributed.rank()}").write_text(str(error))


def test_a_loss_that_is_not_finite_on_split_parameters(tmp_path):
    assert spawn(2, broken, tmp_path) == [0, 0]
    first, second = ((tmp_path / f"error-{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert "step 2: loss nan" in first and "not finite: parameter backbone.norm_f.weight" in first
    with pytest.raises(RuntimeError, match="step 2: loss nan"):
        make_distiller(tmp_path).replay(tmp_path / "dumps" / "step-000000002.json")


def test_all_processes_fill_the_teachers_cache(tmp_path):
    options = {"teacher_top_k": 8, "hidden_weight": 0.0, "steps": 3}
    train(tmp_path / "one", options)
    assert spawn(2, train, tmp_path / "two", options | {"strategy": "fsdp"}) == [0, 0]
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-6)
    one, two = (np.load(tmp_path / name / "teacher_cache" / "done.npy") for name in ("one", "two"))
    assert np.array_equal(one, two) and one.sum() == 3 * BATCH
    costs = [runs.read_metrics(tmp_path / name)[0] for name in ("one", "two")]
    assert costs[1]["kl_full"] > costs[1]["kl_top_k"] > 0 and costs[0]["step"] == costs[1]["step"] == 0


def odd_batch(out: Path) -> None:
    with pytest.raises(ValueError, match="batch_size 4 is not a multiple of 3 processes x 1 sequences"):
        make_distiller(out)
    with pytest.raises(OSError, match="of rank 0"):
        distributed.first(fail)
    assert distributed.first(os.getpid) == distributed.gather_objects(os.getpid())[0]
    made = distributed.mean(torch.tensor(float(distributed.rank())))
    assert made.item() == 1


def fail() -> None:
    assert distributed.rank() == 0
    raise OSError("of rank 0")


def test_what_ranks_agree_on(tmp_path):
    assert spawn(3, odd_batch, tmp_path) == [0, 0, 0]


def test_torchrun(tmp_path):
    """The command on two processes, from text to a packed student; only one of them writes and speaks."""
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    make_teacher().save_pretrained(teacher)
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(teacher / "tokenizer.json"))
    texts = (" ".join(f"w{(i * j) % 97 + 1}" for j in range(30)) for i in range(20))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ternary_ssm"]
    flags = ["--teacher", teacher, "--data", tmp_path / "a.jsonl", "--out", out, "--group-size", "32"]
    sizes = [
        "--tokens",
        str(3 * BATCH * LENGTH),
        "--sequence-length",
        str(LENGTH),
        "--batch-size",
        str(BATCH),
    ]
    options = [
        "--embedding",
        "ternary",
        "--strategy",
        "fsdp",
        "--reset-at-documents",
        "--micro-batch-size",
        "1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "distill", *flags, *sizes, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    student = MambaLM.from_pretrained(out)
    assert student.ternary == TernaryConfig(group_size=32, embedding="ternary")
    assert [r["step"] for r in runs.read_metrics(out)] == [1, 3]
    assert np.load(out / "tokens-train.npy").tolist()[:2] == [1, 1] and not list(out.glob("*.tmp"))
