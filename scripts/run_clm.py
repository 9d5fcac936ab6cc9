r"""Train a causal language model, with FNGD or any other optimizer of the Hugging Face Trainer.

    python scripts/run_clm.py --train_file train.txt --validation_file validation.txt \
        --test_file test.txt --output_dir runs/language --do_train --do_eval --do_predict \
        --eval_strategy epoch --learning_rate 3e-3 \
        --optim fngd --optim_args "damping=1"

    python scripts/run_clm.py settings.json     # the same arguments as JSON

Without --model_name_or_path, a small GPT-2 is trained from scratch. Each text is one row, cut at
--max_length tokens, because FNGD's coefficients belong to rows. Model, metrics.json (perplexity),
pictures and a model card are written to the output folder. scripts/README.md has more examples.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from common import report
from common.arguments import InputError, exit_code, parse, quieten
from common.averaging import AverageArguments
from common.facts import TASKS, settings
from common.source import load_columns
from common.training import make_trainer, push, train
from language.data import DataArguments, tokenize
from language.model import ModelArguments, load_model
from language.perplexity import compute_metrics, surprise
from transformers import DataCollatorForSeq2Seq, TrainingArguments, set_seed

METRICS = TASKS["text-generation"].metrics


def main() -> None:
    """Train, measure and report.

    Raises:
        InputError: If the data cannot be used.
    """
    model_args, data_args, average, args = parse(
        (ModelArguments, DataArguments, AverageArguments, TrainingArguments), __doc__
    )
    quieten(args)
    set_seed(args.seed)
    texts = load_columns(data_args, {"text": data_args.text_column})
    if args.do_train and "train" not in texts:
        raise InputError("--do_train needs training texts: give --train_file")
    known = texts.get("train") or next(iter(texts.values()))
    model, tokenizer = load_model(model_args, known["text"], data_args.max_length)
    tokens = {s: tokenize(rows, tokenizer, data_args.max_length) for s, rows in texts.items()}
    trainer = make_trainer(
        args,
        average,
        model=model,
        train_dataset=tokens.get("train"),
        eval_dataset=tokens.get("validation"),
        # It pads labels with -100, even if the token that ends a text is the padding token.
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        preprocess_logits_for_metrics=surprise,
        compute_metrics=compute_metrics,
    )
    found: dict[str, Any] = {"settings": settings(model_args, data_args, average, args)}
    if args.do_train:
        found |= train(trainer)
    if args.do_eval and "validation" in tokens:
        found["validation"] = trainer.evaluate()
    if args.do_predict and "test" in tokens:
        found["test"] = trainer.predict(tokens["test"], metric_key_prefix="test").metrics
    if trainer.is_world_process_zero():
        written = report.write_run(trainer, found, data_args, "perplexity", "cross-entropy a token")
        report.finish(trainer, found, written, METRICS)
    push(trainer)


cli = functools.partial(exit_code, "run_clm", main)


if __name__ == "__main__":
    sys.exit(cli())
