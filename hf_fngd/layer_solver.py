"""From one layer's inputs and output gradients to its γ, by the settings of FNGD."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_fngd import coefficients, gram
from hf_fngd.coefficients import Solution
from hf_fngd.config import FNGDConfig


class Draws(NamedTuple):
    """A source of random numbers of one layer and step, the same on all devices.

    Attributes:
        seed: Setting of that name.
        step: Optimizer steps so far.
        layer: Number of the layer.
    """

    seed: int
    step: int
    layer: int

    def some_of(self, count: int, wanted: int, device: torch.device, stream: int = 0) -> Tensor:
        """Draws some of the numbers below a count.

        Args:
            count: The count.
            wanted: How many.
            device: Where the result lies.
            stream: Draws of different streams have nothing to do with each other.

        Returns:
            Different numbers, all of them where there are no more than wanted.
        """
        seed = (self.seed * 1_000_003 + self.step) * 1_000_003 + self.layer
        seed += stream * 1_000_003**3
        generator = torch.Generator().manual_seed(seed % 2**63)
        return torch.randperm(count, generator=generator)[:wanted].to(device)

    def features(
        self, count: int, wanted: int | None, device: torch.device, stream: int = 0
    ) -> Tensor | None:
        """Draws the features that a Gram matrix is estimated from.

        Args:
            count: How many there are (in every group of channels).
            wanted: How many to draw; None for all.
            device: Where the result lies.
            stream: As in `some_of`.

        Returns:
            Their numbers; None where all of them are wanted.
        """
        if wanted is None or wanted >= count:
            return None
        return self.some_of(count, wanted, device, stream)


def solve_samples(
    config: FNGDConfig, a: Tensor, g: Tensor, *, bias: bool, kappa: float, draws: Draws
) -> tuple[Solution, Tensor | None]:
    """Gives γ of each sample (fisher_unit=sample).

    Args:
        config: Settings.
        a: Layer inputs `[G, N, T, d_in]`, or those drawn for `gram_inputs`.
        g: Output gradients `[G, N, T, d_out]`, of the same dtype.
        bias: Whether the bias is part of the block.
        kappa: As in `coefficients.damping_ratio`.
        draws: For `gram_outputs`.

    Returns:
        γ as `[N]`, and the per-sample gradients if all of them were materialised.
    """
    outputs = draws.features(g.shape[-1], config.gram_outputs, g.device)
    matrix, per_sample = gram.sample_gram(
        a,
        g,
        bias=bias,
        route=config.gram_route,
        memory_bytes=config.gram_memory_mb * 2**20,
        outputs=outputs,
    )
    solution = coefficients.solve(matrix, **_options(config, kappa))
    return solution._replace(gamma=_temper(config, solution.gamma)), per_sample


def solve_tokens(
    config: FNGDConfig, a: Tensor, g: Tensor, *, bias: bool, kappa: float, draws: Draws
) -> tuple[Solution, Tensor]:
    """Gives γ of each position (fisher_unit=token), exactly or by the Nyström form.

    Args:
        config: Settings.
        a: Layer inputs `[G, N, T, d_in]`.
        g: Output gradients `[G, N, T, d_out]`, of the same dtype.
        bias: Whether the bias is part of the block.
        kappa: As in `coefficients.damping_ratio`, for positions.
        draws: For the landmarks.

    Returns:
        γ as `[N, T]`, and which positions have a gradient, `[N, T]`: padding has none, and is
        neither a sample nor a landmark; its γ is 1.
    """
    groups, n, t, _ = a.shape
    norms = gram.token_norms(a, g, bias=bias)
    alive = norms.nonzero().squeeze(1)
    count = max(1, len(alive))
    options = _options(config, kappa * count / len(norms))
    exact = config.gram_route == "exact" or (
        config.gram_route == "auto" and len(alive) <= 2 * config.num_landmarks
    )
    a, g = a.reshape(groups, -1, 1, a.shape[-1]), g.reshape(groups, -1, 1, g.shape[-1])
    a, g = a[:, alive], g[:, alive]
    if exact or len(alive) == 0:
        solution = coefficients.solve(gram.token_gram(a, g, a, g, bias=bias), **options)
    else:
        chosen = draws.some_of(len(alive), config.num_landmarks, a.device)
        columns = gram.token_gram(a, g, a[:, chosen], g[:, chosen], bias=bias)
        solution = coefficients.solve_nystrom(columns, chosen, norms.sum(), count, **options)
    gamma = torch.ones_like(norms)
    gamma[alive] = _temper(config, solution.gamma)
    return solution._replace(gamma=gamma.view(n, t)), (norms > 0).view(n, t)


def _options(config: FNGDConfig, kappa: float) -> dict[str, Any]:
    return {
        "damping": config.damping,
        "mode": config.damping_mode,
        "kappa": kappa,
        "leave_one_out": config.leave_one_out,
    }


def _temper(config: FNGDConfig, gamma: Tensor) -> Tensor:
    return coefficients.temper(
        gamma, scale=config.gamma_scale, maximum=config.gamma_max, power=config.gamma_power
    )
