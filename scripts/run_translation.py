"""Fine-tunes a translation model, with FNGD or any other optimizer of the Hugging Face Trainer.

    python scripts/run_translation.py --train_file train.jsonl --validation_file validation.jsonl \
        --test_file test.jsonl --source_lang en --target_lang de --output_dir runs/first \
        --optim fngd --optim_args "damping=0.1,share=sample,update_scale=rms" --learning_rate 3e-3

    python scripts/run_translation.py settings.json     # the same arguments as JSON

Without --model_name_or_path a small Marian is trained from scratch. The output folder gets the
model, metrics.json, predictions.jsonl, curves.png and a model card.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import transformers
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from translation import report
from translation.data import DataArguments, InputError, load_pairs
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


class InOrderMixin(Seq2SeqTrainer):
    """Evaluates in the order of the data, also under group_by_length: references have no ids."""

    def _get_eval_sampler(self, eval_dataset: datasets.Dataset) -> SequentialSampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


class FNGDTranslator(InOrderMixin, CardMixin, FNGDSeq2SeqTrainer):
    """The Trainer for `--optim fngd…`."""


class BaselineTranslator(InOrderMixin, CardMixin, LossScaleMixin, Seq2SeqTrainer):
    """The Trainer for every other optimizer, with the same correction of the loss scale."""


def tokenize(
    pairs: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, data: DataArguments
) -> datasets.Dataset:
    """Turns sentence pairs into model inputs.

    Args:
        pairs: Columns `source` and `target`.
        tokenizer: The tokenizer.
        data: Length limits and prefix.

    Returns:
        Columns `input_ids`, `attention_mask` and `labels`.
    """

    def encode(rows: dict[str, list[str]]) -> Any:
        sources = [data.source_prefix + text for text in rows["source"]]
        inputs = tokenizer(sources, max_length=data.max_source_length, truncation=True)
        inputs["labels"] = tokenizer(
            text_target=rows["target"], max_length=data.max_target_length, truncation=True
        )["input_ids"]
        return inputs

    return pairs.map(encode, batched=True, remove_columns=pairs.column_names)


def sentences(pairs: datasets.DatasetDict) -> Iterator[str]:
    """Gives the training text in both languages.

    Args:
        pairs: All splits.

    Yields:
        Sentences.
    """
    rows = pairs.get("train") or next(iter(pairs.values()))
    yield from rows["source"]
    yield from rows["target"]


def parse() -> tuple[ModelArguments, DataArguments, Seq2SeqTrainingArguments]:
    """Reads the command line, or a JSON file with the same arguments and options after it.

    Returns:
        Model, data and training arguments.
    """
    parser = HfArgumentParser(
        [ModelArguments, DataArguments, Seq2SeqTrainingArguments], description=__doc__
    )
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


def main() -> None:
    """Trains, translates and reports.

    Raises:
        InputError: If the data cannot be used.
    """
    model_args, data_args, args = parse()
    if args.should_log:
        transformers.utils.logging.set_verbosity_warning()
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
    found: dict[str, Any] = {"settings": _settings(model_args, data_args, args)}
    if args.do_train:
        trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
        found["train"] = trained.metrics
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
    if args.push_to_hub:
        trainer.push_to_hub()


def _settings(*groups: Any) -> dict[str, Any]:
    model_args, data_args, args = groups
    chosen = (
        "optim",
        "optim_args",
        "optim_target_modules",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "weight_decay",
        "max_grad_norm",
        "label_smoothing_factor",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "bf16",
        "fp16",
        "seed",
    )
    training = {name: getattr(args, name) for name in chosen}
    plain = {name: getattr(value, "value", value) for name, value in training.items()}
    return {"model": asdict(model_args), "data": asdict(data_args), "training": plain}


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
    surroundings = report.environment()
    optimizer = unwrap_optimizer(trainer.optimizer)
    training = found["settings"]["training"]
    history = trainer.state.log_history
    found |= {"environment": surroundings, "history": history}
    if optimizer is not None:
        found["fngd"] = {"config": optimizer.config.to_dict(), "layers": optimizer.selection.rows()}
    report.write_json(folder / "metrics.json", found)
    written = [folder / "metrics.json"]
    if history:
        title = f"{data_args.describe()}, {training['optim']}"
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
    trainer.card_facts = CardFacts(
        model_name=folder.resolve().name,
        task="translation",
        dataset=data_args.describe(),
        languages=[data_args.source_lang, data_args.target_lang],
        base_model=model_args.model_name_or_path,
        optimizer=str(training["optim"]),
        settings=optimizer.config.to_dict() if optimizer is not None else training,
        layers=str(optimizer.selection) if optimizer is not None else "",
        seed=trainer.args.seed,
        metrics={name: scores[name] for name in ("bleu", "chrf") if name in scores},
        signatures={n: scores[f"{n}_signature"] for n in ("bleu", "chrf") if n in scores},
        curves="curves.png" if history else None,
        limits=LIMITS,
        **surroundings,
    )
    trainer.create_model_card()
    written.append(folder / "README.md")
    _print_summary(found, written)


def _print_summary(found: dict[str, Any], written: list[Path]) -> None:
    losses = [entry["loss"] for entry in found["history"] if "loss" in entry]
    if losses:
        print(f"\ntraining loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    bleus = [entry["eval_bleu"] for entry in found["history"] if "eval_bleu" in entry]
    if bleus:
        print("validation BLEU, evaluation by evaluation: " + ", ".join(f"{b:.2f}" for b in bleus))
    if "test" in found:
        for name, label in (("bleu", "BLEU"), ("chrf", "chrF")):
            print(f"test {label}: {found['test'][name]:.2f}   {found['test'][name + '_signature']}")
    for path in written:
        print(f"written: {path}")


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
