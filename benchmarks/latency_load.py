"""From a directory on disk to the first token: the time, and the memory that it takes, each in a new process.

The clock begins behind the imports; the file is in the page cache. The resident memory is the peak's growth
since the imports, through a few steps of decoding; some of it are the states, which are no part of the file.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from latency_model import config_of, random_model
from timing import begin, chosen_models, comma_list, write

from ternary_ssm import TernaryConfig

CHILD = """
import json, sys, time
import torch
from ternary_ssm import MambaLM

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3 * 1.024

imported, start = peak(), time.perf_counter()
model = MambaLM.from_pretrained(sys.argv[1], dtype=torch.float32)
loaded = time.perf_counter()
model.generate([[7]], 1)
first = time.perf_counter()
model.generate([[7]], 8)
print(json.dumps([(loaded - start) * 1e3, (first - start) * 1e3, peak() - imported]))
"""


@dataclass
class LoadRecord:
    """Medians. resident_ratio: resident_mb without the states, over file_mb."""

    bench: str
    model: str
    file_mb: float
    states_mb: float
    load_ms: float
    first_token_ms: float  # behind a prompt of one
    first_token_min_ms: float
    resident_mb: float
    resident_ratio: float


@torch.no_grad()
def bench_load(args: argparse.Namespace, name: str) -> Iterator[LoadRecord]:
    ternary = TernaryConfig(group_size=args.group_size, embedding="int8")
    with tempfile.TemporaryDirectory() as directory:
        model = random_model(config_of(name), ternary, "cpu", torch.float16)
        model.save_pretrained(directory)
        cache = model.empty_cache(1)
        states = (cache.ssm.nbytes + 2 * cache.conv.nbytes) / 1e6  # the convolution's in fp32
        del model, cache
        size = (Path(directory) / "model.safetensors").stat().st_size / 1e6
        command, found = [sys.executable, "-c", CHILD, directory], []
        for _ in range(args.rounds):
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout))
    load, first, resident = (statistics.median(values) for values in zip(*found, strict=True))
    least = min(values[1] for values in found)
    record = LoadRecord("load", name, size, states, load, first, least, resident, (resident - states) / size)
    print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else v for k, v in asdict(record).items()))
    yield record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=comma_list(), default=["mamba2-1.3b"], help="names or parts of them")
    parser.add_argument("--group-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7, help="processes")


def run(args: argparse.Namespace) -> None:
    if args.device != "cpu":
        raise SystemExit("--device cuda: loading is measured on a CPU")
    head, _ = begin(args)
    write(args, head, (record for name in chosen_models(args.models) for record in bench_load(args, name)))
