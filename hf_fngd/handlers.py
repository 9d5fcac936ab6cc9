"""What the capture of a layer and the preconditioner behind it say to each other."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from hf_fngd.calls import Call

# A call and the backward pass that it belongs to.
Delivery = tuple[int, Call]


class Pass:
    """One forward pass as a preconditioner sees it; preconditioners derive their own.

    Args:
        fresh: Whether coefficients are computed in this pass, or looked up.
    """

    def __init__(self, fresh: bool) -> None:
        self.fresh = fresh
        # Parameters behind their gate, and the calls that have delivered, by layer.
        self.gates: dict[int, tuple[Tensor, Tensor | None, list[Delivery]]] = {}


class LayerHandler(Protocol):
    """What a preconditioner does for one layer; implemented once per method."""

    @property
    def idle(self) -> bool:
        """Whether calls are left alone until the optimizer says otherwise."""

    def numbers(self) -> tuple[Tensor, Tensor] | None:
        """Gives what a compiled graph takes along: layer and batch; None if it must break."""

    def begin(self, rows: int) -> Pass | None:
        """Gives the pass that a call belongs to, or None to leave the call alone."""

    def weights(self, batch: Any, x: Tensor, g: Tensor) -> Tensor:
        """Looks up γ `[N]` or `[N, T]` for one call."""

    def compute(
        self, batch: Any, calls: list[Call], bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gives the weight and bias gradients of all calls of one forward."""
