"""Batches of sentence pairs and a Marian without dropout, for studies at fixed weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from common.seq2seq import tokenize
from transformers import DataCollatorForSeq2Seq, set_seed

from translation.data import DataArguments, load_pairs, sentences
from translation.model import ModelArguments, load_model


@dataclass
class Corpus:
    """Sentence pairs, and the model that trains on them."""

    train_file: str = field(
        default="data/multi30k/train.en-de.jsonl.gz", metadata={"help": "Sentence pairs."}
    )
    rows: int = field(default=2000, metadata={"help": "Number of pairs, the first of the file."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Trained model to start from; default: a new Marian."}
    )
    d_model: int = field(default=128, metadata={"help": "Width of the Marian."})
    layers: int = field(default=2, metadata={"help": "Layers on each side."})
    batch_size: int = field(default=64, metadata={"help": "Pairs a batch."})
    threads: int = field(default=2, metadata={"help": "Threads of torch."})


class Data:
    """Batches of tokenised pairs.

    Args:
        study: Which pairs and which model.
    """

    def __init__(self, study: Corpus) -> None:
        torch.set_num_threads(study.threads)
        set_seed(0)
        arguments = DataArguments(
            source_lang="en",
            target_lang="de",
            train_file=study.train_file,
            max_train_samples=study.rows,
            max_source_length=64,
            max_target_length=64,
        )
        pairs = load_pairs(arguments)
        shape = ModelArguments(
            model_name_or_path=study.model_name_or_path,
            d_model=study.d_model,
            ffn_dim=4 * study.d_model,
            layers=study.layers,
            dropout=0.0,
        )
        self.model, tokenizer = load_model(shape, sentences(pairs), 64, ("en", "de"))
        for module in self.model.modules():
            if hasattr(module, "dropout"):  # a trained model brings its own
                module.dropout = 0.0
        self.rows = list(tokenize(pairs["train"], tokenizer, arguments))
        self.collate = DataCollatorForSeq2Seq(tokenizer, model=self.model)
        self.size = study.batch_size

    def batches(self, seed: int) -> Any:
        """Divide all pairs at random, and yield row numbers and model inputs."""
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))
        for rows in order.split(self.size):
            yield rows, self.collate([self.rows[i] for i in rows.tolist()])
