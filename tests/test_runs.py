"""What a training run leaves behind when it is interrupted, killed or damaged, and how it goes on."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from ternary_ssm import runs
from ternary_ssm.distill import Distiller, DistillError
from test_distill import BATCH, LENGTH, logged, make_distiller, one_thread  # noqa: F401


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Metrics and final weights of six steps in one go."""
    torch.set_num_threads(1)
    d = make_distiller(out := tmp_path_factory.mktemp("unbroken"))
    d.train()
    return logged(out), d.student.state_dict()


def assert_same_run(d: Distiller, unbroken) -> None:
    metrics, weights = unbroken
    assert logged(d.out) == metrics
    assert all(torch.equal(w, weights[name]) for name, w in d.student.state_dict().items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_is_the_unbroken_one(tmp_path, monkeypatch, unbroken, number):
    d = make_distiller(tmp_path)
    step = d.train_step

    def signalled():
        if d.step == 2:
            os.kill(os.getpid(), number)
        return step()

    monkeypatch.setattr(d, "train_step", signalled)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as error:
        d.train()
    if number == signal.SIGTERM:
        assert error.value.code == 143
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert [p.name for p in runs.checkpoints(tmp_path)] == ["step-000000002.pt", "step-000000003.pt"]

    resumed = make_distiller(tmp_path)
    resumed.train(resume=True)
    assert_same_run(resumed, unbroken)


KILLED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_distill
torch.set_num_threads(1)
test_distill.make_distiller(Path(sys.argv[2]), steps=10_000, save_every=1).train(resume=True)
"""


def save_forever(out: Path, saved) -> None:
    """Tells the steps whose checkpoints it has saved."""
    torch.set_num_threads(1)
    found = runs.load_checkpoint(out)
    step = 0 if found is None else found[1]["step"]
    while True:
        step += 1
        runs.save_checkpoint(out, step, {"step": step, "weights": torch.full((1 << 16,), float(step))})
        saved.send(step)


def test_fifty_kills_lose_no_saved_checkpoint(tmp_path):
    """SIGKILL at random moments of a process that only saves: what it said to have saved can be read."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ternary_ssm.trainer", "pytest"])
    chance, saved = random.Random(0), 0
    for _ in range(50):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_forever, args=(tmp_path, sender))
        process.start()
        sender.close()
        assert receiver.poll(60)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                saved = receiver.recv()
        assert 1 <= len(runs.checkpoints(tmp_path)) <= 3
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a damaged checkpoint
            _, state = runs.load_checkpoint(tmp_path)
        assert state["step"] in (saved, saved + 1)
        assert (state["weights"] == state["step"]).all()
        assert {p.name for p in tmp_path.iterdir()} == {"checkpoints"}
    assert saved > 50


def test_kill_never_leaves_a_torn_checkpoint(tmp_path):
    """SIGKILL at a random moment of a run that does little but save."""
    chance, reached = random.Random(0), 0
    command = [sys.executable, "-c", KILLED, Path(__file__).parent]
    for _ in range(2):
        process = subprocess.Popen([*command, tmp_path], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not any(int(p.stem[5:]) > reached for p in runs.checkpoints(tmp_path)):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.communicate()
        found = runs.checkpoints(tmp_path)
        assert 1 <= len(found) <= 3  # three between a write and the removal of the oldest
        for path in found:
            assert torch.load(path, weights_only=True)["step"] == int(path.stem[5:])
        reached = int(found[-1].stem[5:])
    d = make_distiller(tmp_path, steps=10_000, save_every=1)
    d._resume()
    assert d.step == reached


def test_a_checkpoint_gets_its_name_when_it_is_whole(tmp_path, monkeypatch):
    replaced, replace = [], os.replace

    def watched(temporary, path):
        assert not Path(path).exists()
        assert torch.load(temporary, weights_only=True)["step"] == 0
        replaced.append(Path(path).name)
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", watched)
    make_distiller(tmp_path).save()
    assert replaced == ["step-000000000.pt"] == [p.name for p in (tmp_path / "checkpoints").iterdir()]


@pytest.fixture
def interruptible():
    """Python's own handler of Ctrl-C, which a process started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once(interruptible):
    with pytest.raises(KeyboardInterrupt), runs.deferred_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_damaged_checkpoints_are_refused(tmp_path, unbroken):
    d = make_distiller(tmp_path)
    for _ in range(4):
        d.train_step()
        d.save()
    _, last = runs.checkpoints(tmp_path)
    content = last.read_bytes()
    middle = len(content) // 2  # among the weights
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (b"", content[:100], content[:middle], content[:-1], flipped):
        last.write_bytes(damaged)
        again = make_distiller(tmp_path)
        with pytest.warns(UserWarning, match=r"step-000000004\.pt is damaged, going back"):
            again._resume()
        assert again.step == 3
    again.train_step()
    again.train_step()
    again.save()  # step 5: the good one before it stays
    assert last.with_suffix(".damaged").exists()
    assert [p.name for p in runs.checkpoints(tmp_path)] == ["step-000000003.pt", "step-000000005.pt"]
    for path in runs.checkpoints(tmp_path):
        path.write_bytes(b"torn")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(RuntimeError, match="none of its 2 check"):
        make_distiller(tmp_path)._resume()


def test_resume_refuses_another_run(tmp_path):
    d = make_distiller(tmp_path)
    d.train_step()
    d.save()
    with pytest.raises(DistillError, match=r"learning_rate was 0\.003, is 0\.001"):
        make_distiller(tmp_path, learning_rate=1e-3).train(resume=True)
    with pytest.raises(DistillError, match="teacher was"):
        make_distiller(tmp_path, seed=1).train(resume=True)
    with pytest.raises(DistillError, match="data was 500 tokens"):
        make_distiller(tmp_path, data_seed=1).train(resume=True)
    with pytest.raises(DistillError, match="holds checkpoints"):
        make_distiller(tmp_path).train()
    make_distiller(tmp_path, log_every=3, save_every=7)._resume()  # these may change


def test_resume_without_a_checkpoint_begins_anew(tmp_path, unbroken):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n{"step": 2, "lo')  # killed before saving
    d = make_distiller(tmp_path)
    with pytest.warns(UserWarning, match="no checkpoint: beginning at step 0"):
        d.train(resume=True)
    assert_same_run(d, unbroken)
