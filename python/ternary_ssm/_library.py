"""Loads the kernels, which then answer as torch.ops.ternary.*"""

from importlib.resources import files

import torch

_LIBRARIES = {entry.name: str(entry) for entry in files(__package__).iterdir() if entry.name.endswith(".so")}

if hasattr(torch.ops.ternary, "gemm"):  # a second copy would crash the process
    raise ImportError("torch.ops.ternary is taken: is another copy of ternary_ssm loaded?")
if "libternary_cpu.so" not in _LIBRARIES:
    raise ImportError(f"libternary_cpu.so is not in {files(__package__)}: build it with 'pip install .'")
torch.ops.load_library(_LIBRARIES["libternary_cpu.so"])
if torch.version.cuda and "libternary_cuda.so" in _LIBRARIES:
    torch.ops.load_library(_LIBRARIES["libternary_cuda.so"])
