"""What a run does to each rounded weight on its way into the step: counts zeros, keeps rows, anneals."""

from __future__ import annotations

import torch
from torch import Tensor

from .models import MambaLM
from .quantizer import FakeQuantize
from .surgery import quantized_layers


class Rounding:
    """Hooks on the FakeQuantize of every layer of a student.

    share: of the rounded weight; the forward takes latent + share (rounded - latent), and the gradient goes
        to the latent weight whatever it is. Trained scales get theirs times share.
    counting: whether a forward counts the zeros of what it rounds; it does not wait for the device.
    """

    def __init__(self, student: MambaLM, dense_rows: list[slice]) -> None:
        """dense_rows: of in_proj, that keep the latent weight."""
        self.share, self.counting = 1.0, False
        self._zeros: dict[str, Tensor] = {}
        for name, layer in quantized_layers(student):
            fake, (n, k) = layer.parametrizations.weight[-1], layer.parametrizations.weight.original.shape
            rows, count = None, n * k
            if dense_rows and name.endswith("in_proj"):
                rows = torch.ones(n, 1, dtype=torch.bool)
                for dense in dense_rows:
                    rows[dense] = False
                count = int(rows.sum()) * k
                rows = rows.to(student.device)
            fake.register_forward_hook(self._hook(name, rows, count))

    def _hook(self, name: str, rows: Tensor | None, count: int):
        """rows bool [n, 1], those rounded; count: the weights in them."""

        def hook(fake: FakeQuantize, inputs: tuple[Tensor], rounded: Tensor) -> Tensor | None:
            if self.counting and count and name not in self._zeros:  # once, though blocks may run again
                ternary = rounded.detach() if rows is None else rounded.detach() * rows
                self._zeros[name] = 1 - ternary.count_nonzero() / count
            if self.share == 1 and rows is None:
                return None  # as it is
            latent = inputs[0].to(rounded.dtype)
            if self.share < 1:
                rounded = latent + self.share * (rounded - latent)
            return rounded if rows is None else torch.where(rows, rounded, latent)

        return hook

    def begin(self, share: float, counting: bool) -> None:
        """Of a step: what its forwards do."""
        self.share, self.counting, self._zeros = share, counting, {}

    def ratios(self) -> dict[str, float]:
        """Share of zero codes of each layer, if the last step counted them; waits for the device."""
        values = torch.stack(list(self._zeros.values())).tolist() if self._zeros else []
        return dict(zip(self._zeros, values, strict=True))
