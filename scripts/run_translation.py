r"""Fine-tunes a translation model, with FNGD or any other optimizer of the Hugging Face Trainer.

    python scripts/run_translation.py --train_file train.jsonl --validation_file validation.jsonl \
        --test_file test.jsonl --source_lang en --target_lang de --output_dir runs/first \
        --optim fngd --optim_args "damping=0.1,share=sample,update_scale=rms" --learning_rate 3e-3

    python scripts/run_translation.py settings.json     # the same arguments as JSON

Without --model_name_or_path a small Marian is trained from scratch. The output folder gets the
model, metrics.json, predictions.jsonl, curves.png and a model card.
"""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import datasets
import transformers
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from translation import report
from translation.data import DataArguments, InputError, load_pairs, sentences, tokenize
from translation.metrics import ComputeMetrics, score
from translation.model import ModelArguments, load_model

from hf_fngd import FNGDError, FNGDSeq2SeqTrainer
from hf_fngd.hf.callback import unwrap_optimizer
from hf_fngd.hf.card import CardFacts, CardMixin
from hf_fngd.hf.loss_scale import LossScaleMixin

SHOWN = 10
LIMITS = [
    "The scores are those of one run with one seed.",
    "The model knows the kind of sentence it was trained on and little else.",
]


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and names defaults."""


class InOrderMixin(Seq2SeqTrainer):
    """Evaluates in the order of the data, also under group_by_length: references have no ids."""

    def _get_eval_sampler(self, eval_dataset: datasets.Dataset) -> SequentialSampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


class FNGDTranslator(InOrderMixin, CardMixin, FNGDSeq2SeqTrainer):
    """The Trainer for `--optim fngd…`."""


class BaselineTranslator(InOrderMixin, CardMixin, LossScaleMixin, Seq2SeqTrainer):
    """The Trainer for every other optimizer, with the same correction of the loss scale."""


def parse() -> tuple[ModelArguments, DataArguments, Seq2SeqTrainingArguments]:
    """Reads the command line, or a JSON file with the same arguments.

    Returns:
        Model, data and training arguments.

    Raises:
        InputError: If the file cannot be read, or settings contradict each other.
    """
    parser = HfArgumentParser(
        [ModelArguments, DataArguments, Seq2SeqTrainingArguments],
        description=__doc__,
        formatter_class=_Help,
        usage="%(prog)s SETTINGS.json, or --name value ... (see --help)",
    )
    settings = sys.argv[1] if len(sys.argv) == 2 and sys.argv[1].endswith(".json") else None
    try:
        if settings:
            return parser.parse_json_file(settings)
        return parser.parse_args_into_dataclasses()
    except (OSError, ValueError, TypeError) as error:
        where = f"cannot use {settings!r}: " if settings else "cannot use these arguments: "
        raise InputError(where + " ".join(str(error).split())) from None


def main() -> None:
    """Trains, translates and reports.

    Raises:
        InputError: If the data cannot be used.
    """
    model_args, data_args, args = parse()
    if Path(args.output_dir).is_file():
        raise InputError(f"--output_dir {args.output_dir!r} is a file: choose a folder")
    _quieten(args)
    set_seed(args.seed)
    pairs = load_pairs(data_args)
    if args.do_train and "train" not in pairs:
        raise InputError("--do_train needs training pairs: give --train_file")
    languages = (data_args.source_lang, data_args.target_lang)
    longest = max(data_args.max_source_length, data_args.max_target_length)
    model, tokenizer = load_model(model_args, sentences(pairs), longest, languages)
    tokens = {split: tokenize(rows, tokenizer, data_args) for split, rows in pairs.items()}
    args.predict_with_generate = True
    args.generation_max_length = args.generation_max_length or data_args.max_target_length
    metrics = ComputeMetrics(tokenizer)
    if "validation" in pairs:
        metrics.expect(pairs["validation"]["target"], tokens["validation"]["labels"])
    kind = FNGDTranslator if str(args.optim).startswith("fngd") else BaselineTranslator
    trainer = kind(
        model=model,
        args=args,
        train_dataset=tokens.get("train"),
        eval_dataset=tokens.get("validation"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=None),
        processing_class=tokenizer,
        compute_metrics=metrics,
    )
    found: dict[str, Any] = {"settings": report.settings(model_args, data_args, args)}
    if args.do_train:
        trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        # As an internal call, for it would push a card that knows no results yet.
        trainer.save_model(_internal_call=True)
        trainer.save_state()
        found["train"] = trained.metrics
        # Without the final evaluations, which decode with more beams than those of the training.
        found["history"] = list(trainer.state.log_history)
    if args.do_eval and "validation" in tokens:
        found["validation"] = trainer.evaluate(num_beams=model_args.num_beams)
    if args.do_predict and "test" in tokens:
        metrics.expect(pairs["test"]["target"], tokens["test"]["labels"])
        output = trainer.predict(
            tokens["test"], metric_key_prefix="test", num_beams=model_args.num_beams
        )
        found["test"] = {**output.metrics, **score(metrics.predictions, metrics.references)}
    if trainer.is_world_process_zero():
        _report(trainer, pairs, metrics, found, model_args, data_args)
    if args.push_to_hub and args.do_train:
        trainer.push_to_hub()


def _quieten(args: Seq2SeqTrainingArguments) -> None:
    # The Trainer's bar is the one that matters, and an error stays the only line.
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
    if args.should_log:
        transformers.utils.logging.set_verbosity_warning()


def _report(
    trainer: Any,
    pairs: datasets.DatasetDict,
    metrics: ComputeMetrics,
    found: dict[str, Any],
    model_args: ModelArguments,
    data_args: DataArguments,
) -> None:
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = unwrap_optimizer(trainer.optimizer)
    training = found["settings"]["training"]
    history = found.get("history", [])
    found["environment"] = report.environment()
    if optimizer is not None:
        found["fngd"] = {"config": optimizer.config.to_dict(), "layers": optimizer.selection.rows()}
    report.write_json(folder / "metrics.json", found)
    written = [folder / "metrics.json"]
    if history:
        title = f"{data_args.describe('train')}, {training['optim']}"
        report.plot_curves(folder / "curves.png", history, title)
        written.append(folder / "curves.png")
    scores = found.get("test", {})
    if scores:
        sources, references = pairs["test"]["source"], pairs["test"]["target"]
        path = folder / "predictions.jsonl"
        report.write_predictions(path, sources, references, metrics.predictions)
        written.append(path)
        for source, reference, prediction in list(
            zip(sources, references, metrics.predictions, strict=True)
        )[:SHOWN]:
            print(f"\n  {source}\n  = {reference}\n  > {prediction}")
    if trainer.args.do_train:
        trainer.card_facts = _card_facts(trainer, found, model_args, data_args)
        trainer.create_model_card()
        written.append(folder / "README.md")
    report.print_summary(found, written)


def _card_facts(
    trainer: Any, found: dict[str, Any], model_args: ModelArguments, data_args: DataArguments
) -> CardFacts:
    optimizer = unwrap_optimizer(trainer.optimizer)
    training, scores = found["settings"]["training"], found.get("test", {})
    return CardFacts(
        model_name=Path(trainer.args.output_dir).resolve().name,
        task="translation",
        dataset=data_args.describe("train"),
        test_dataset=data_args.describe("test"),
        languages=[data_args.source_lang, data_args.target_lang],
        base_model=model_args.model_name_or_path,
        optimizer=str(training["optim"]),
        settings=optimizer.config.to_dict() if optimizer is not None else training,
        layers=str(optimizer.selection) if optimizer is not None else "",
        seed=trainer.args.seed,
        metrics={name: scores[name] for name in ("bleu", "chrf") if name in scores},
        signatures={n: scores[f"{n}_signature"] for n in ("bleu", "chrf") if n in scores},
        curves="curves.png" if found["history"] else None,
        limits=LIMITS,
        **found["environment"],
    )


def cli() -> int:
    """Runs the job; what the user can mend ends it with one line on stderr.

    Returns:
        Exit code.
    """
    try:
        main()
    except (InputError, FNGDError) as error:
        print(f"run_translation: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
