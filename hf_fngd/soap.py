"""The basis of SOAP: eigenvectors of Shampoo's factors (Vyas et al. 2024, arXiv 2409.11321).

For the gradient M `[d_out, d_in]` of a matrix W, with L and R running averages of MMᵀ and MᵀM, and
their eigenvectors Q_L and Q_R, SOAP is Adam on Q_LᵀMQ_R, whose steps are turned back. Later bases
come from one step of orthogonal iteration, as in the paper: the Q of a QR decomposition of LQ_L.

A side that is much longer than the other keeps its own coordinates, as that of a vocabulary does:
an embedding and a head have a basis for their features alone. There it matters most: the inputs of
a head share a large mean, so the gradients of all its rows do, and scales of single entries cannot
take it out.

Adam's moments live in the basis. A new basis takes them along, the first as a matrix and the second
as a diagonal: v ← (T_L ∘ T_L) v (T_R ∘ T_R)ᵀ with T = Q_newᵀQ_old. Where eigenvectors only change
their order or sign, that reorders v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fngd.errors import FNGDError
from hf_fngd.solve.coefficients import eigen

# Steps from one basis to the next. Factors average the gradients of these steps only.
PERIOD = 10
# Longest side that has a basis, and how often it may be as long as the other.
LONGEST, RATIO = 4096, 8
# Counters in a state: steps since the basis is in use, and gradients in the factors.
COUNTS = ("age", "seen")


def sides(shape: torch.Size) -> dict[str, int]:
    """Return the sides of a parameter that have a basis.

    Args:
        shape: Its shape; a kernel counts as the matrix `[d_out, rest]`, and a row or a column as no
            matrix.

    Returns:
        Their lengths, by `left` and `right`.
    """
    if len(shape) < 2:
        return {}
    lengths = {"left": shape[0], "right": shape[1:].numel()}
    shorter = min(lengths.values())
    if shorter < 2:
        return {}
    longest = min(LONGEST, RATIO * shorter)
    return {name: length for name, length in lengths.items() if length <= longest}


def turns(param: Tensor) -> bool:
    """Return whether a parameter has a basis: a real one with a side that is not too long."""
    return not param.is_complex() and bool(sides(param.shape))


def into_basis(grad: Tensor, state: dict[str, Any], beta2: float) -> Tensor:
    """Turn a gradient into the parameter's basis, which is renewed every `PERIOD` steps.

    Args:
        grad: Gradient of the parameter.
        state: The parameter's optimizer state, changed in place.
        beta2: Weight of the old factors in their averages, a step.

    Returns:
        Q_LᵀMQ_R, `[d_out, d_in]`.

    Raises:
        FNGDError: For a part of a gradient (FSDP).
    """
    if hasattr(grad, "placements"):
        raise FNGDError(
            "SOAP needs whole gradients, which FSDP divides among processes: use DDP, or set "
            "other_rule=adamw and another update_rule"
        )
    matrix = grad.reshape(len(grad), -1)
    if "age" not in state:
        _begin(matrix, state)
    if state["age"] >= PERIOD:
        _renew(matrix, state, beta2)
    state["age"] += 1
    return _turn(matrix, *(_basis(state, side) for side in ("left", "right")))


def out_of_basis(turned: Tensor, state: dict[str, Any]) -> Tensor:
    """Turn an update back.

    Args:
        turned: Update in the basis, `[d_out, d_in]`.
        state: The parameter's optimizer state.

    Returns:
        Q_L U Q_Rᵀ.
    """
    left, right = (_basis(state, side) for side in ("left", "right"))
    return _turn(turned, *(None if q is None else q.mT for q in (left, right)))


def _basis(state: dict[str, Any], side: str) -> Tensor | None:
    return state.get(f"basis_{side}")


def _turn(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    if left is not None:
        matrix = left.mT @ matrix
    return matrix if right is None else matrix @ right


def _begin(matrix: Tensor, state: dict[str, Any]) -> None:
    """Start with the parameter's own coordinates."""
    for side, length in sides(matrix.shape).items():
        state[f"factor_{side}"] = matrix.new_zeros(length, length)
        state[f"basis_{side}"] = torch.eye(length).to(matrix)
    state |= {"age": PERIOD, "seen": 0}


def _renew(matrix: Tensor, state: dict[str, Any], beta2: float) -> None:
    """Take a gradient into the factors, and find the basis and the moments in it.

    A gradient that is zero or not finite says nothing, and the next one is asked.
    """
    rows = {side: matrix if side == "left" else matrix.mT for side in sides(matrix.shape)}
    products = {side: one @ one.mT for side, one in rows.items()}
    if not all(0 < float(product.norm()) < torch.inf for product in products.values()):
        return
    state |= {"age": 0, "seen": state["seen"] + 1}
    keep = min(1 - 1 / state["seen"], beta2**PERIOD)
    turned: dict[str, Tensor | None] = {"left": None, "right": None}
    for side, product in products.items():
        basis = state[f"basis_{side}"]
        state[f"factor_{side}"] = factor = state[f"factor_{side}"].lerp(product, 1 - keep)
        found = _vectors(factor, basis if state["seen"] > 1 else None)
        # A checkpoint gives it back in this layout, in which products are the same bits.
        state[f"basis_{side}"] = found = found.contiguous()
        turned[side] = basis.mT @ found
    if "exp_avg" in state:
        left, right = turned.values()
        state["exp_avg"] = _turn(state["exp_avg"], left, right)
        squares = [None if t is None else t.square() for t in (left, right)]
        state["exp_avg_sq"] = _turn(state["exp_avg_sq"], *squares)


def _vectors(factor: Tensor, basis: Tensor | None) -> Tensor:
    """Return eigenvectors, largest eigenvalue first, or a step towards them from an older basis."""
    if basis is None:
        return eigen(factor)[1].flip(1)
    product = factor @ basis
    order = (basis * product).sum(0).argsort(descending=True)
    return torch.linalg.qr(product[:, order])[0]
