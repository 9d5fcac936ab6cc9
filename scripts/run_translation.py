r"""Train a translation model, with FNGD or any other optimizer of the Hugging Face Trainer.

    python scripts/run_translation.py --train_file train.jsonl --validation_file validation.jsonl \
        --test_file test.jsonl --source_lang en --target_lang de --output_dir runs/first \
        --do_train --do_eval --do_predict --eval_strategy epoch --learning_rate 3e-3 \
        --optim fngd --optim_args "damping=1,share=sample"

    python scripts/run_translation.py settings.json     # the same arguments as JSON

Without --model_name_or_path, a small Marian is trained from scratch. Model, metrics.json,
predictions.jsonl, pictures and a model card are written to the output folder. scripts/README.md
has more examples.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import datasets
import sacrebleu
from common import report
from common.arguments import InputError, exit_code, parse, quieten
from common.averaging import AverageArguments
from common.facts import TASKS, settings
from common.metrics import MetricArguments, metric_names
from common.seq2seq import (
    ComputeMetrics,
    load_text_metrics,
    make_writer,
    tokenize,
    write_predictions,
)
from common.training import push, train
from transformers import Seq2SeqTrainingArguments, set_seed
from translation.data import DataArguments, load_extra_tests, load_pairs, sentences
from translation.metrics import score
from translation.model import ModelArguments, load_model
from translation.noise import separation

from hf_fngd.hf.callback import unwrap_optimizer

METRICS = TASKS["translation"].metrics


def main() -> None:
    """Train, translate and report.

    Raises:
        InputError: If the data cannot be used.
    """
    kinds = (ModelArguments, DataArguments, MetricArguments, AverageArguments)
    model_args, data_args, metric_args, average, args = parse(
        (*kinds, Seq2SeqTrainingArguments), __doc__
    )
    quieten(args)
    more = load_text_metrics(metric_args)
    set_seed(args.seed)
    pairs, extra = load_pairs(data_args), load_extra_tests(data_args)
    if args.do_train and "train" not in pairs:
        raise InputError("--do_train needs training pairs: give --train_file")
    languages = (data_args.source_lang, data_args.target_lang)
    longest = max(data_args.max_source_length, data_args.max_target_length)
    model, tokenizer = load_model(model_args, sentences(pairs), longest, languages)
    metrics = ComputeMetrics(tokenizer, score, more)
    trainer, tokens = make_writer(model, args, average, data_args, pairs, metrics)
    found: dict[str, Any] = {"settings": settings(model_args, data_args, average, args)}
    if args.do_train:
        # The history must not contain the final evaluations, which decode with more beams.
        found |= train(trainer)
        if data_args.misaligned_fraction:
            optimizer = unwrap_optimizer(trainer.optimizer)
            found["misaligned"] = separation(optimizer, pairs["train"])
    if args.do_eval and "validation" in tokens:
        found["validation"] = trainer.evaluate(num_beams=model_args.num_beams)
    if args.do_predict:
        tests = {**extra, **({"test": pairs["test"]} if "test" in pairs else {})}
        for name, rows in tests.items():
            inputs = tokens["test"] if name == "test" else tokenize(rows, tokenizer, data_args)
            metrics.expect(rows["target"], inputs["labels"])
            output = trainer.predict(
                inputs, metric_key_prefix="test", num_beams=model_args.num_beams
            )
            scores = {**output.metrics, **metrics.scores}
            if name != "test":
                numbers = {n: v for n, v in metrics.scores.items() if isinstance(v, float)}
                scores = {f"{metric}_{name}": value for metric, value in numbers.items()}
            # The test set proper comes last, so the translations that are reported are its own.
            found.setdefault("test", {}).update(scores)
    if trainer.is_world_process_zero():
        _report(trainer, pairs, metrics, found, data_args)
    push(trainer)


def _report(
    trainer: Any,
    pairs: datasets.DatasetDict,
    metrics: ComputeMetrics,
    found: dict[str, Any],
    data_args: DataArguments,
) -> None:
    folder = Path(trainer.args.output_dir)
    written = report.write_run(
        trainer, found, data_args, "bleu", "cross-entropy a token", sacrebleu
    )
    scores = found.get("test", {})
    if scores and "test" in pairs:
        written.append(write_predictions(folder, pairs["test"], metrics.predictions))
    report.finish(trainer, found, written, [*METRICS, *metric_names(metrics.more)])


cli = functools.partial(exit_code, "run_translation", main)


if __name__ == "__main__":
    sys.exit(cli())
