"""Times operators, scans and whole models at the sizes of the published Mamba models, beside other libraries.

    python benchmarks/latency.py ops   [--models 1.3b,2.7b] [--rows 1,8,64]
    python benchmarks/latency.py scan  [--models mamba2-1.3b] [--bench ssd,step]
    python benchmarks/latency.py model [--models mamba2] [--bench decode] [--batches 1,8]
    python benchmarks/latency.py load  [--models mamba2-1.3b]

All take --device cuda|cpu and --out FILE. Peers run where they can be imported. Prints what it finds and
writes a JSON file.
"""

import argparse
from pathlib import Path

import latency_load
import latency_model
import latency_ops
import latency_scan
import torch

COMMANDS = {"ops": latency_ops, "scan": latency_scan, "model": latency_model, "load": latency_load}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        command.add_argument("--device", choices=["cuda", "cpu"], default=device)
        command.add_argument("--no-peers", dest="peers", action="store_false", help="without other libraries")
        command.add_argument("--out", type=Path, help=f"the JSON file (results/{name}-DEVICE-DATE.json)")
        module.add_arguments(command)
    args = parser.parse_args()
    COMMANDS[args.command].run(args)


if __name__ == "__main__":
    main()
