"""Measure how much of the loss of other batches a method's direction can remove.

    python scripts/direction_quality.py --output scripts/bench/results/direction_quality.json

A Marian is trained with Muon. At some points of the training every method computes its direction Δ
from batches A at fixed weights, and its gain is measured on independent batches B:

    ½ (Δᵀ∇L)² / (ΔᵀGΔ)

This is what the best step along Δ would take from the loss L of B, if the loss were quadratic with
the Gauss-Newton matrix G of B: ΔᵀGΔ is the mean over label tokens of the variance of Δz under the
model's distribution, Δz the change of the logits along Δ. The length of Δ does not matter. `gain`
is the ratio to the first row of the same part of the model, with its standard error over B. Once
Δ is the first step of an optimizer, once its tenth, with the momentum and the averages of ten
batches. A method that does not beat the plain gradient here needs no training to be ruled out.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bench.measure import parse, write_results
from coefficient_noise import Options
from tabulate import tabulate
from torch import Tensor, nn
from translation.batches import Corpus, Data

from hf_fngd import create_preconditioned_optimizer

_HALF = {"method": "ekfac", "curvature_power": 0.5, "second_moments": "batch"}
_FRESH = {"method": "fngd", "share": "none", "update_scale": "none"}
# Settings by direction; those of the hidden layers come first, then those of the other parameters.
HIDDEN: dict[str, dict[str, Any]] = {
    "plain": {"method": "plain"},
    "fngd, λ = 1": {**_FRESH, "damping": 1.0},
    "fngd, λ = 0.1": {**_FRESH, "damping": 0.1},
    "fngd, leave_one_out": {**_FRESH, "leave_one_out": True},
    "tengrad": {"method": "tengrad", "update_period": 1, "damping": 1.0},
    "eva": {"method": "eva"},
    "kfac": {"method": "kfac", "inverse_period": 1},
    "ekfac": {"method": "ekfac", "inverse_period": 1, "damping": 1.0},
    "ekfac, p = 1/2": {**_HALF, "inverse_period": 1},
    "adamw": {"method": "plain", "update_rule": "adamw"},
    "soap": {"method": "soap"},
    "muon": {"method": "muon"},
    "ekfac, p = 1/2, muon": {**_HALF, "inverse_period": 1, "update_rule": "muon"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "adamw": {"method": "plain"},
    "soap": {"method": "plain", "other_rule": "soap"},
}
PARTS = {"hidden layers": HIDDEN, "embedding, norms, head": OTHERS}


@dataclass
class Points(Corpus):
    """Data, model, training, and what is measured when."""

    rows: int = field(default=29000, metadata={"help": "Number of pairs, the first of the file."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of the training."})
    other_lr: float = field(default=1e-2, metadata={"help": "That of embeddings and norms."})
    epochs: list[float] = field(
        default_factory=lambda: [0.2, 1.0, 3.0], metadata={"help": "Epochs after which to measure."}
    )
    steps: int = field(default=10, metadata={"help": "Steps of the later direction."})
    repeats: int = field(
        default=2, metadata={"help": "Directions of each kind, from other batches."}
    )
    judges: int = field(default=16, metadata={"help": "Batches B."})


def directions(
    data: Data, settings: dict[str, Any], hidden: bool, seed: int, steps: int
) -> list[list[tuple[nn.Parameter, Tensor]]]:
    """Compute the first and the last of some steps, all of them at the present weights.

    Args:
        data: The pairs and the model, which keeps its weights.
        settings: Settings of the optimizer.
        hidden: Whether the direction moves the selected layers, or all other parameters.
        seed: Order of the batches.
        steps: Number of steps.

    Returns:
        Two directions: the parameters that move, each with its step downhill.
    """
    model = data.model
    optimizer = create_preconditioned_optimizer(model, lr=1.0, **settings)
    chosen = {id(p) for p in optimizer.selection.parameters()}
    moved = [p for p in model.parameters() if p.requires_grad and (id(p) in chosen) == hidden]
    weights = [p.detach().clone() for p in model.parameters()]
    starts = [p.detach().clone() for p in moved]
    found = []
    for number, (rows, inputs) in zip(range(steps), data.batches(seed), strict=False):
        optimizer.set_batch(rows)
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        made = [p.detach() - b for p, b in zip(moved, starts, strict=True)]
        found += [list(zip(moved, made, strict=True))] * ((number == 0) + (number == steps - 1))
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), weights)
    optimizer.detach()
    assert len(found) == 2, "there are fewer batches than steps: give more rows"
    return found


def slopes(model: nn.Module, inputs: Any) -> dict[int, Tensor]:
    """Return the gradient of a batch's loss, by the identity of the parameter."""
    model(**inputs).loss.backward()
    found = {id(p): p.grad.clone() for p in model.parameters() if p.grad is not None}
    model.zero_grad()
    return found


@torch.no_grad()
def curvature(
    model: nn.Module, direction: Sequence[tuple[nn.Parameter, Tensor]], inputs: Any
) -> float:
    """Compute ΔᵀGΔ of a batch by central differences of the logits.

    Args:
        model: The model.
        direction: Δ, by parameter.
        inputs: The batch, with labels.

    Returns:
        Mean over label tokens of the variance of Δz.
    """
    length = sum(float(step.square().sum()) for _, step in direction) ** 0.5
    size = sum(float(p.square().sum()) for p, _ in direction) ** 0.5
    epsilon = 1e-3 * size / length
    weights = [p.clone() for p, _ in direction]
    logits = []
    for sign in (epsilon, -epsilon):
        for (p, step), weight in zip(direction, weights, strict=True):
            p.copy_(weight + sign * step)
        logits.append(model(**inputs).logits)
    for (p, _), weight in zip(direction, weights, strict=True):
        p.copy_(weight)
    counted = inputs["labels"] != -100
    up, down = (one[counted].double() for one in logits)
    change, chances = (up - down) / (2 * epsilon), ((up + down) / 2).softmax(-1)
    mean = (chances * change).sum(-1, keepdim=True)
    return float((chances * (change - mean).square()).sum(-1).mean())


def gain(
    model: nn.Module,
    direction: Sequence[tuple[nn.Parameter, Tensor]],
    slope: dict[int, Tensor],
    inputs: Any,
) -> float:
    """Compute ½ (Δᵀ∇L)² / (ΔᵀGΔ) on a batch; 0 for a direction that goes uphill.

    Args:
        model: The model.
        direction: Δ, by parameter.
        slope: Result of `slopes`.
        inputs: The batch.

    Returns:
        The gain, in the unit of the loss.
    """
    # The positions of a loaded Marian are parameters, and in no graph.
    known = ((slope[id(p)], step) for p, step in direction if id(p) in slope)
    along = sum(float((one.double() * step).sum()) for one, step in known)
    return 0.5 * min(along, 0.0) ** 2 / curvature(model, direction, inputs)


def measure(data: Data, study: Points) -> list[dict[str, Any]]:
    """Compare all directions at the present weights.

    Args:
        data: The pairs and the model.
        study: What to measure.

    Returns:
        Rows of numbers.
    """
    model = data.model.eval()
    judges = [inputs for _, (_, inputs) in zip(range(study.judges), data.batches(99), strict=False)]
    known = [slopes(model, inputs) for inputs in judges]
    rows = []
    for part, kinds in PARTS.items():
        first: list[list[float]] = []
        for name, settings in kinds.items():
            row: dict[str, Any] = {"part": part, "direction": name}
            # By step (first, last), the mean gain of each batch B.
            gains = [[0.0] * len(judges) for _ in range(2)]
            for seed in range(study.repeats):
                both = directions(data, settings, kinds is HIDDEN, 100 + seed, study.steps)
                for sums, direction in zip(gains, both, strict=True):
                    for number, (inputs, slope) in enumerate(zip(judges, known, strict=True)):
                        sums[number] += gain(model, direction, slope, inputs) / study.repeats
            first = first or gains
            for when, mine, base in zip(("first", "last"), gains, first, strict=True):
                ratio, error = relative(mine, base)
                row |= {f"gain, {when} step": ratio, f"error, {when} step": error}
            row["loss removed by the first step"] = statistics.mean(gains[0])
            rows.append(row)
            print(row, flush=True)
    model.train()
    return rows


def relative(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Return the ratio of two means over the same batches, and its standard error."""
    mean = statistics.mean(base)
    ratio = statistics.mean(values) / mean
    rest = [v - ratio * b for v, b in zip(values, base, strict=True)]
    return ratio, statistics.stdev(rest) / (mean * len(rest) ** 0.5)


def main() -> None:
    """Run the study from the command line."""
    study, options = parse([Points, Options], __doc__)
    data = Data(study)
    trainer = create_preconditioned_optimizer(
        data.model, method="muon_soap", lr=study.learning_rate, other_lr=study.other_lr
    )
    per_epoch = -(-len(data.rows) // study.batch_size)
    rows, step, epoch = [], 0, 0
    batches = iter(data.batches(1000))
    for epochs in sorted(study.epochs):
        while step < round(epochs * per_epoch):
            pair = next(batches, None)
            if pair is None:
                epoch += 1
                batches = iter(data.batches(1000 + epoch))
                continue
            data.model(**pair[1]).loss.backward()
            trainer.step()
            trainer.zero_grad()
            step += 1
        rows += [{"epochs": epochs, **row} for row in measure(data, study)]
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3f"))
    write_results(options.output, study, {"measurements": rows})


if __name__ == "__main__":
    main()
