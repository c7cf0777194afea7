"""Ternary Mamba language models: quantize_ and distil them, pack_ them, run them."""

from . import _library, ops  # noqa: F401
from .config import MambaConfig, TernaryConfig
from .models import MambaLM
from .surgery import pack_, quantize_

__all__ = ["MambaConfig", "MambaLM", "TernaryConfig", "pack_", "quantize_"]
__version__ = "0.1.0"
