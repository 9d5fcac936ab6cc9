"""EKFAC: second moments in KFAC's eigenbasis (George et al. 2018, arXiv 1806.03884).

KFAC says that F has the eigenvectors of A ⊗ G and, as eigenvalues, their products. EKFAC keeps the
eigenvectors, Q_A and Q_G, and measures the second moments S of gradients in that basis:

    V = Q_G [(Q_Gᵀ M Q_A) ∘ (λ/(S + λ))^p] Q_Aᵀ.

With p = 1 that is λ(F + λI)⁻¹M, the paper's natural gradient. With p = 1/2 it divides by √S, as
Adam and SOAP (Vyas et al. 2024) do in their bases: a whitening, which an orthogonalising rule
(`update_rule=muon`) may follow. Both go to the plain gradient as λ → ∞. For a fixed S the map is
linear, so that momentum before and after it is the same.

S is carried over into a new basis: F = (Q_G ⊗ Q_A) diag(S) (Q_G ⊗ Q_A)ᵀ has a diagonal there, which
becomes the new S, S ← (R_G ∘ R_G) S (R_A ∘ R_A)ᵀ with R = Q_newᵀ Q_old. Where eigenvectors only
change their order or sign, that reorders S. The first S is KFAC's, the products of eigenvalues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_fngd.config import setting
from hf_fngd.errors import FNGDError
from hf_fngd.layers import LayerType
from hf_fngd.methods.curvature import inverse_or_zero
from hf_fngd.methods.kfac import FactoredConfig, FactoredCurvature, eigenbasis
from hf_fngd.methods.preconditioned import PreconditionedOptimizer

# Rotated rows, or gradients of samples, that are in memory at a time.
_BLOCK_BYTES = 2**26


@dataclass
class EKFACConfig(FactoredConfig):
    """Settings of EKFAC, checked when the object is made.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    title: ClassVar[str] = "EKFAC"

    damping: float = setting(
        0.1,
        "Damping λ > 0; relative: in units of the mean of the layer's second moments S.",
        above=0.0,
        resumed=True,
    )
    second_moments: str = setting(
        "positions",
        "Second moments S in the eigenbasis: positions (of each position's gradient; the "
        "cheaper), samples (of each sample's gradient, its positions summed; the paper) or batch "
        "(of the mean gradient, at every step).",
        choices=("positions", "samples", "batch"),
        resumed=True,
    )
    curvature_power: float = setting(
        1.0,
        "p of (λ/(S + λ))^p, in (0, 1]: 1 is the natural gradient; 0.5 divides by the root of S, "
        "as Adam does, and is meant for update_rule=muon.",
        above=0.0,
        at_most=1.0,
        resumed=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_clip is not None and self.curvature_power != 1:
            raise FNGDError(
                "kl_clip predicts the change of a natural-gradient step: set curvature_power=1, or "
                "kl_clip=none"
            )


class EKFACLayer(FactoredCurvature):
    """EKFAC for one layer; a grouped convolution has a basis and moments for each group."""

    config: EKFACConfig

    def __init__(self, optimizer: Any, number: int, module: nn.Module, kind: LayerType) -> None:
        super().__init__(optimizer, number, module, kind)
        self._of_batch = self.config.second_moments == "batch"
        if not self._of_batch:
            self.averaged, self.powers = (*self.averaged, "moments"), (*self.powers, 2)
        if self.config.second_moments == "samples":
            self.rows_are_sure = False

    def shapes(self) -> list[tuple[int, ...]]:
        moments = [] if self._of_batch else [tuple(self.shape)]
        return [*super().shapes(), *moments]

    def describe_rows(
        self, a: Tensor, g: Tensor, mask: Tensor | None, samples: int
    ) -> list[Tensor]:
        found = super().describe_rows(a, g, mask, samples)
        if self._of_batch:
            return found
        if "basis_a" not in self.state:
            return [*found, found[0].new_zeros(self.shape)]
        basis = self.state["basis_a"], self.state["basis_g"]
        total = rotated_moments(a, g, *basis, whole=self.config.second_moments == "samples")
        return [*found, total / g.shape[1]]

    def invert(self) -> None:
        state = self.state
        values, turns = [], []
        for side in ("a", "g"):
            old = state.get(f"basis_{side}")
            eigenvalues, basis = eigenbasis(state[side])
            state[f"basis_{side}"] = basis
            values.append(eigenvalues)
            if old is not None:
                turns.append((basis.mT @ old.to(basis)).square())
        if turns:
            turn_a, turn_g = turns
            state["moments"] = turn_g @ state["moments"] @ turn_a.mT
            return
        first = values[1].unsqueeze(2) * values[0].unsqueeze(1)
        state["moments"] = torch.zeros_like(first) if self._of_batch else first
        if self._of_batch:
            state["batches"] = torch.tensor(0, device="cpu")

    def combine(self, m: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        state = self.state
        if "basis_a" not in state:
            return m, m.new_zeros(())
        a, g = state["basis_a"], state["basis_g"]
        rotated = g.mT @ m @ a
        # Alike on all ranks, whichever of them lost its statistics.
        if self._of_batch:
            self._take_in(rotated.square())
        moments = state["moments"]
        damping = self.damping(moments.sum(), moments.numel())
        # (λ/(S + λ))^p without dividing by a λ that may be 0.
        shrink = (1 + inverse_or_zero(damping) * moments).pow(-self.config.curvature_power)
        return g @ (rotated * shrink) @ a.mT, damping

    def _take_in(self, squares: Tensor) -> None:
        state = self.state
        done = int(state["batches"])
        keep = min(1 - 1 / (done + 1), self.config.stat_decay)
        averaged = state["moments"].lerp(squares, 1 - keep)
        state["moments"] = torch.where(squares.isfinite().all(), averaged, state["moments"])
        state["batches"] = torch.tensor(done + 1, device="cpu")


class EKFAC(PreconditionedOptimizer):
    """EKFAC (George et al. 2018) for the selected layers, AdamW for the rest."""

    config_class = EKFACConfig
    layer_class = EKFACLayer
    method = "ekfac"


def rotated_moments(a: Tensor, g: Tensor, basis_a: Tensor, basis_g: Tensor, whole: bool) -> Tensor:
    """Sum the squares of gradients in a basis.

    Args:
        a: Inputs `[G, N, T, d_in]`.
        g: Output gradients `[G, N, T, d_out]`.
        basis_a: Q_A as `[G, d_in, d_in]`.
        basis_g: Q_G as `[G, d_out, d_out]`.
        whole: Whether a gradient is that of a sample, its positions summed, or of a position.

    Returns:
        Σ (Q_Gᵀ g aᵀ Q_A)², `[G, d_out, d_in]`.
    """
    groups, n, t, d_in = a.shape
    d_out = g.shape[-1]
    total = a.new_zeros(groups, d_out, d_in)
    each = t * (d_in + d_out) + (d_in * d_out if whole else 0)
    samples = max(1, _BLOCK_BYTES // (groups * each * a.element_size()))
    for some_a, some_g in zip(a.split(samples, 1), g.split(samples, 1), strict=True):
        x = some_a.flatten(1, 2) @ basis_a.to(a)
        y = some_g.flatten(1, 2) @ basis_g.to(g)
        if whole:
            u = y.view(groups, -1, t, d_out).mT @ x.view(groups, -1, t, d_in)
            total += u.square_().sum(1)
        else:
            total += y.square_().mT @ x.square_()
    return total
