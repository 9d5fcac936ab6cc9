r"""Train an image classifier, with FNGD or any other optimizer of the Hugging Face Trainer.

    python scripts/run_image_classification.py --train_file train.parquet --validation_rows 2000 \
        --test_file test.parquet --crop_padding 4 --flip true --output_dir runs/first --do_train \
        --do_eval --do_predict --eval_strategy epoch --learning_rate 1e-3 \
        --optim fngd --optim_args "damping=1"

    python scripts/run_image_classification.py settings.json     # the same arguments as JSON

Without --model_name_or_path, a ResNet-18 for small images (3x3 stem, no pooling) is trained from
scratch. Model, metrics.json, predictions.jsonl, pictures and a model card are written to the output
folder. `--optim sgd` has no momentum without `--optim_args momentum=0.9`. scripts/README.md has
more examples.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from common import report
from common.arguments import InputError, exit_code, parse, quieten
from common.averaging import AverageArguments
from common.facts import TASKS, settings
from common.metrics import MetricArguments, load_metrics, metric_names, rehearse
from common.training import make_trainer, push, train
from images.data import DataArguments, class_names, class_numbers, load_splits
from images.metrics import ComputeMetrics, best_classes
from images.model import ModelArguments, classes_of, load_model
from images.pixels import load_pixels
from transformers import TrainingArguments, set_seed

METRICS = TASKS["image-classification"].metrics


def main() -> None:
    """Train, classify and report.

    Raises:
        InputError: If the data cannot be used.
    """
    kinds = (ModelArguments, DataArguments, MetricArguments, AverageArguments)
    model_args, data_args, metric_args, average, args = parse((*kinds, TrainingArguments), __doc__)
    quieten(args)
    more = load_metrics(metric_args, "int", "string")
    splits = load_splits(data_args)
    if args.do_train and "train" not in splits:
        raise InputError("--do_train needs training images: give --train_file or --train_dir")
    if getattr(args.eval_strategy, "value", args.eval_strategy) != "no" and (
        "validation" not in splits
    ):
        raise InputError(
            "--eval_strategy needs validation images: give --validation_file, --validation_dir or "
            "--validation_rows"
        )
    if model_args.model_name_or_path and not args.do_train:
        names, _ = classes_of(model_args)
    else:
        names = class_names(next(iter(splits.values())))
    if len(names) < 2:
        raise InputError(f"there is one class only, {names[0]!r}: give images of two or more")
    labels = {split: class_numbers(split, rows, names) for split, rows in splits.items()}
    rehearse(more, int=range(len(names)), string=names)
    set_seed(args.seed)
    images, collator, processor = load_pixels(splits, labels, model_args, data_args)
    model = load_model(model_args, names, len(collator.mean))
    trainer = make_trainer(
        args,
        average,
        model=model,
        train_dataset=images.get("train"),
        eval_dataset=images.get("validation"),
        data_collator=collator,
        processing_class=processor,
        compute_metrics=ComputeMetrics(names, more),
    )
    found: dict[str, Any] = {"settings": settings(model_args, data_args, average, args)}
    predictions: list[dict[str, str]] = []
    if args.do_train:
        found |= train(trainer)
    if args.do_eval and "validation" in images:
        found["validation"] = trainer.evaluate()
    if args.do_predict and "test" in images:
        output = trainer.predict(images["test"], metric_key_prefix="test")
        found["test"] = output.metrics
        predictions = [
            {"label": names[label], "prediction": names[best]}
            for label, best in zip(labels["test"], best_classes(output.predictions), strict=True)
        ]
    if trainer.is_world_process_zero():
        _report(trainer, predictions, found, data_args, [*METRICS, *metric_names(more)])
    push(trainer)


def _report(
    trainer: Any,
    predictions: list[dict[str, str]],
    found: dict[str, Any],
    data_args: DataArguments,
    metrics: list[str],
) -> None:
    folder = Path(trainer.args.output_dir)
    # Saving the model copied its code to the folder if the class is not one of transformers.
    found["custom_code"] = hasattr(trainer.model.config, "auto_map")
    written = report.write_run(trainer, found, data_args, "accuracy", "cross-entropy an image")
    if predictions:
        report.write_rows(folder / "predictions.jsonl", predictions)
        written.append(folder / "predictions.jsonl")
    report.finish(trainer, found, written, metrics)


cli = functools.partial(exit_code, "run_image_classification", main)


if __name__ == "__main__":
    sys.exit(cli())
