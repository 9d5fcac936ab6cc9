r"""Fine-tune a summarization model, with FNGD or any other optimizer of the Hugging Face Trainer.

    python scripts/run_summarization.py --model_name_or_path google-t5/t5-small \
        --source_prefix "summarize: " --train_file train.jsonl --test_file test.jsonl \
        --output_dir runs/summaries --do_train --do_predict --optim fngd \
        --optim_args "damping=1" --learning_rate 1e-4

    python scripts/run_summarization.py settings.json     # the same arguments as JSON

A row of a file is {"text": "...", "summary": "..."}. Model, metrics.json (ROUGE),
predictions.jsonl, pictures and a model card are written to the output folder. ROUGE needs the
package rouge_score. scripts/README.md has more examples.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import report
from common.arguments import InputError, exit_code, parse, quieten
from common.averaging import AverageArguments
from common.facts import settings
from common.metrics import MetricArguments, metric_names
from common.pretrained import PretrainedArguments, load_pretrained, with_adapters
from common.seq2seq import (
    ComputeMetrics,
    load_text_metrics,
    make_writer,
    write_predictions,
)
from common.training import push, train
from summarization.data import DataArguments, load_pairs
from summarization.metrics import METRICS, score
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainingArguments, set_seed


@dataclass
class ModelArguments(PretrainedArguments):
    """A pretrained model, and its generation."""

    num_beams: int = field(default=4, metadata={"help": "Beams of the final summaries."})


def main() -> None:
    """Train, summarize and report.

    Raises:
        InputError: If the data or the model cannot be used.
    """
    kinds = (ModelArguments, DataArguments, MetricArguments, AverageArguments)
    model_args, data_args, metric_args, average, args = parse(
        (*kinds, Seq2SeqTrainingArguments), __doc__
    )
    quieten(args)
    score([], [])  # A missing rouge_score ends the run here, and not after the training.
    more = load_text_metrics(metric_args)
    set_seed(args.seed)
    pairs = load_pairs(data_args)
    if args.do_train and "train" not in pairs:
        raise InputError("--do_train needs training rows: give --train_file")
    if model_args.model_name_or_path is None:
        raise InputError("summaries need a trained model: give --model_name_or_path")
    model, tokenizer = load_pretrained(
        model_args,
        AutoModelForSeq2SeqLM,
        "sequence-to-sequence head: choose a model such as T5, BART or Pegasus",
        max(data_args.max_source_length, data_args.max_target_length),
        "--max_source_length and --max_target_length",
    )
    model = with_adapters(model, model_args, "SEQ_2_SEQ_LM")
    metrics = ComputeMetrics(tokenizer, score, more)
    trainer, tokens = make_writer(model, args, average, data_args, pairs, metrics)
    found: dict[str, Any] = {"settings": settings(model_args, data_args, average, args)}
    if args.do_train:
        found |= train(trainer)
    if args.do_eval and "validation" in tokens:
        found["validation"] = trainer.evaluate(num_beams=model_args.num_beams)
    if args.do_predict and "test" in tokens:
        metrics.expect(pairs["test"]["target"], tokens["test"]["labels"])
        found["test"] = trainer.predict(
            tokens["test"], metric_key_prefix="test", num_beams=model_args.num_beams
        ).metrics
    if trainer.is_world_process_zero():
        written = report.write_run(trainer, found, data_args, "rougeL", "cross-entropy a token")
        if "test" in found:
            folder = Path(args.output_dir)
            written.append(write_predictions(folder, pairs["test"], metrics.predictions))
        report.finish(trainer, found, written, [*METRICS, *metric_names(metrics.more)])
    push(trainer)


cli = functools.partial(exit_code, "run_summarization", main)


if __name__ == "__main__":
    sys.exit(cli())
