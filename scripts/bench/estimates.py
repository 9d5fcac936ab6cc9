r"""What a cheaper Gram matrix costs in quality: γ, direction and training loss, against the exact.

    python scripts/bench/estimates.py --threads 1 --seeds 2 \
        --model_name_or_path runs/tatoeba-marian-small \
        --output scripts/bench/results/estimates.json

Real sentence pairs, a Marian whose layers have `d_model` or four times as many outputs. For each
estimate, a setting of FNGD in the words of `--optim_args`,

- at the weights that training starts from: correlation of the estimated γ with the exact one over
  pairs, and cosines with the natural gradient of a batch, averaged over layers; what the plain
  gradient reaches is beside them.
- after `--epochs` of training with `share=sample, update_scale=rms`: training loss of the last
  epoch, mean and deviation over seeds, and its ratio to the exact one's.

What it saves is in the results of step_time.py.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, field
from typing import Any

from coefficient_noise import Data, Options, Setting, correlation, cosine, gradients, table
from tabulate import tabulate
from transformers import HfArgumentParser
from workload import write_results

from hf_fngd import FNGDConfig, create_fngd_optimizer
from hf_fngd.hf.registry import split_words


@dataclass
class Estimates(Setting):
    """Data, model and training."""

    estimates: list[str] = field(
        default_factory=lambda: [
            "gram_outputs=16",
            "gram_outputs=64",
            "gram_inputs=16,gram_outputs=64",
            "gram_dtype=bfloat16",
        ],
        metadata={"help": "Settings of FNGD, each name=value or several with commas."},
    )
    dampings: list[float] = field(
        default_factory=lambda: [0.1, 1.0], metadata={"help": "Relative λ."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Of the selected weights."})
    epochs: int = field(default=3, metadata={"help": "Epochs of training."})
    seeds: int = field(default=3, metadata={"help": "Trainings of each."})


def settings(words: str) -> dict[str, Any]:
    """Reads the settings that an estimate sets.

    Args:
        words: name=value, several with commas; empty: none.

    Returns:
        Values by name.
    """
    pairs = split_words(words)
    config = FNGDConfig.from_strings(pairs)
    return {name: getattr(config, name) for name in pairs}


def directions(data: Data, damping: float, estimate: str, probed: int) -> dict[str, float]:
    """Compares estimated with exact coefficients of some batches.

    Args:
        data: The pairs and the model.
        damping: Relative λ.
        estimate: The cheaper matrix.
        probed: Number of batches.

    Returns:
        Mean correlation and cosines.
    """
    found: dict[str, list[float]] = {"r": [], "cos": [], "cos: plain": []}
    for batch in itertools.islice(data.batches(0), probed):
        gammas, natural = [], []
        for words in ("", estimate):
            optimizer = create_fngd_optimizer(
                data.model,
                lr=0.0,
                damping=damping,
                num_samples=len(data.rows),
                **settings(words),
            )
            natural.append(gradients(data, optimizer, batch))
            optimizer.start_epoch(1)
            store = optimizer.coefficients.store
            gammas.append(table(optimizer)[store.locate(batch[0].tolist(), create=False)])
        found["r"].append(correlation(*gammas))
        found["cos"].append(cosine(*natural))
        found["cos: plain"].append(cosine(gradients(data, None, batch), natural[0]))
    return {name: statistics.mean(values) for name, values in found.items()}


def train(data: Data, study: Estimates, damping: float, estimate: str, seed: int) -> float:
    """Trains a copy of the model.

    Args:
        data: The pairs and the model, which ends as it was.
        study: Settings.
        damping: Relative λ.
        estimate: The cheaper matrix; empty: the exact one.
        seed: Of the order of pairs, and of the outputs.

    Returns:
        Mean loss of the last epoch.
    """
    start = {name: value.clone() for name, value in data.model.state_dict().items()}
    optimizer = create_fngd_optimizer(
        data.model,
        lr=study.learning_rate,
        other_lr=study.other_lr,
        update_scale="rms",
        damping=damping,
        num_samples=len(data.rows),
        seed=seed,
        **settings(estimate),
    )
    losses: list[float] = []
    for epoch in range(study.epochs):
        optimizer.start_epoch(epoch)
        losses.clear()
        for rows, inputs in data.batches(1000 * seed + epoch):
            optimizer.set_batch(rows)
            loss = data.model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    optimizer.detach()
    data.model.load_state_dict(start)
    return statistics.mean(losses)


def main() -> None:
    """Runs the study from the command line."""
    parser = HfArgumentParser([Estimates, Options], description=__doc__)
    study, options = parser.parse_args_into_dataclasses()
    data = Data(study)
    rows: list[dict[str, Any]] = []
    for damping in study.dampings:
        exact: list[float] = []
        for estimate in ("", *study.estimates):
            row: dict[str, Any] = {"damping": damping, "estimate": estimate}
            if estimate:
                row |= directions(data, damping, estimate, study.probed)
            losses = [train(data, study, damping, estimate, seed) for seed in range(study.seeds)]
            exact = exact or losses
            ratios = [one / other for one, other in zip(losses, exact, strict=True)]
            row |= {"loss": statistics.mean(losses), "ratio": statistics.mean(ratios)}
            row["deviation"] = statistics.pstdev(ratios)
            rows.append(row)
            print(row, flush=True)
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4f"))
    write_results(options.output, study, {"measurements": rows})


if __name__ == "__main__":
    main()
