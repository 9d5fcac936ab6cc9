"""Measure how far a sample's coefficient carries over to other batches and to later weights.

    python scripts/coefficient_noise.py --output scripts/bench/results/coefficient_noise.json

FNGD keeps γ of the first epoch for later ones, where a sample meets other samples and other
weights. A Marian is trained with AdamW, and after some epochs γ of every pair is computed at fixed
weights, for two divisions of the pairs into batches. The results are:

- Correlations of γ over pairs, averaged over layers: `batch` (same weights, other companions),
  `weights` (same companions, weights of the time before) and `both`.
- Cosines with the natural gradient of a batch, averaged over layers and batches: of the plain
  gradient, of the one weighted by γ from the other division (`shared`), and by γ from the other
  division and the time before (`old`). Coefficients that kept nothing of the natural gradient would
  do no better than the plain one. `length` is the length of the shared direction, divided by that
  of the natural one.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bench.measure import parse, write_results
from tabulate import tabulate
from torch import Tensor
from translation.batches import Corpus, Data

from hf_fngd import FNGD, create_fngd_optimizer, create_preconditioned_optimizer


@dataclass
class Study(Corpus):
    """Data, model and training."""

    learning_rate: float = field(
        default=2e-3, metadata={"help": "Learning rate of the selected weights."}
    )
    other_lr: float = field(
        default=5e-3, metadata={"help": "Learning rate of embeddings and norms."}
    )
    probed: int = field(default=8, metadata={"help": "Batches whose directions are compared."})
    dampings: list[float] = field(
        default_factory=lambda: [0.01, 0.1, 1.0, 10.0], metadata={"help": "Relative λ."}
    )
    epochs: list[int] = field(
        default_factory=lambda: [1, 2, 5, 10],
        metadata={"help": "Epochs after which γ is computed."},
    )


@dataclass
class Options:
    """The result file."""

    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def collect(data: Data, damping: float, seed: int) -> FNGD:
    """Compute γ of every pair at the present weights.

    Args:
        data: The pairs and the model.
        damping: Relative λ.
        seed: Division into batches.

    Returns:
        A detached optimizer that holds γ and is in an epoch that reuses it.
    """
    optimizer = create_fngd_optimizer(data.model, lr=0.0, damping=damping)
    optimizer.bind_dataset(len(data.rows))
    for rows, inputs in data.batches(seed):
        optimizer.set_batch(rows)
        data.model(**inputs).loss.backward()
    optimizer.start_epoch(1)
    optimizer.zero_grad()
    optimizer.detach()
    return optimizer


def table(optimizer: FNGD) -> Tensor:
    """Return γ `[rows, layers]` of an optimizer from `collect`."""
    gamma = optimizer.coefficients()
    assert gamma is not None
    return gamma.double()


def gradients(
    data: Data, optimizer: FNGD, batch: tuple[Tensor, Any], plain: bool = False
) -> list[Tensor]:
    """Compute a batch's gradients of the selected layers.

    Args:
        data: The model.
        optimizer: A detached optimizer, with its layers and coefficients.
        batch: Row numbers and inputs.
        plain: Whether to leave the coefficients out.

    Returns:
        A vector for each layer.
    """
    if not plain:
        optimizer.attach()
        optimizer.set_batch(batch[0])
    data.model(**batch[1]).loss.backward()
    weights = [data.model.get_parameter(f"{name}.weight") for name in optimizer.layer_names]
    found = [weight.grad.flatten().clone() for weight in weights]
    data.model.zero_grad()
    optimizer.detach()
    return found


def cosine(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Average the cosine of two directions over layers."""
    pairs = zip(first, second, strict=True)
    return statistics.mean(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs)


def compare(
    data: Data, damping: float, shared: FNGD, old: FNGD | None, probed: int
) -> dict[str, float]:
    """Compare directions with the natural gradient.

    Args:
        data: The pairs and the model.
        damping: Relative λ.
        shared: Optimizer with γ of division 0 at these weights.
        old: Optimizer with γ of division 0 at earlier weights.
        probed: Number of batches of division 1.

    Returns:
        Mean cosines, and the mean ratio of lengths.
    """
    fresh = create_fngd_optimizer(data.model, lr=0.0, damping=damping, share="none")
    fresh.detach()
    rows: dict[str, list[float]] = {"plain": [], "shared": [], "length": [], "old": []}
    for batch in itertools.islice(data.batches(1), probed):
        natural = gradients(data, fresh, batch)
        reused = gradients(data, shared, batch)
        rows["plain"].append(cosine(gradients(data, fresh, batch, plain=True), natural))
        rows["shared"].append(cosine(reused, natural))
        ratios = [float(a.norm() / b.norm()) for a, b in zip(reused, natural, strict=True)]
        rows["length"].append(statistics.mean(ratios))
        if old is not None:
            rows["old"].append(cosine(gradients(data, old, batch), natural))
    return {name: statistics.mean(values) for name, values in rows.items() if values}


def correlation(first: Tensor, second: Tensor) -> float:
    """Average Pearson's correlation of two γ `[rows, layers]` over layers."""
    a, b = ((t - t.mean(0)) / t.std(0, correction=0) for t in (first, second))
    return float((a * b).mean())


def main() -> None:
    """Run the study from the command line."""
    study, options = parse([Study, Options], __doc__)
    data = Data(study)
    model = data.model
    trainer = create_preconditioned_optimizer(
        model, method="plain", lr=study.learning_rate, update_rule="adamw", other_lr=study.other_lr
    )
    before: dict[float, FNGD] = {}
    rows, done, loss = [], 0, None
    for epochs in sorted(study.epochs):
        trainer.attach()
        for epoch in range(done, epochs):
            for _, inputs in data.batches(1000 + epoch):
                loss = model(**inputs).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                trainer.step()
                trainer.zero_grad()
        done = epochs
        trainer.detach()
        for damping in study.dampings:
            first, second = (collect(data, damping, seed) for seed in (0, 1))
            row = {
                "epochs": epochs,
                "loss": None if loss is None else float(loss.detach()),
                "damping": damping,
                "mean γ": float(table(first).mean()),
                "deviation": float(table(first).std(0).mean()),
                "r: batch": correlation(table(first), table(second)),
            }
            old = before.get(damping)
            if old is not None:
                row["r: weights"] = correlation(table(first), table(old))
                row["r: both"] = correlation(table(second), table(old))
            cosines = compare(data, damping, first, old, study.probed)
            rows.append(row | {f"cos: {n}" if n != "length" else n: v for n, v in cosines.items()})
            before[damping] = first
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3f"))
    write_results(options.output, study, {"measurements": rows})


if __name__ == "__main__":
    main()
