"""A training script that knows nothing of hf_fngd; run by test_runner.py and test_ddp.py."""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.hf_utils import pad_collator, tiny_marian, token_pairs  # noqa: E402


def main():
    (args,) = HfArgumentParser(Seq2SeqTrainingArguments).parse_args_into_dataclasses()
    trainer = Seq2SeqTrainer(
        model=tiny_marian(),
        args=args,
        train_dataset=token_pairs(30),
        data_collator=pad_collator,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_state()
    rank = args.process_index
    torch.save(trainer.model.state_dict(), f"{args.output_dir}/weights{rank}.pt")
    store = getattr(trainer.optimizer.optimizer, "store", None)
    if store is not None:
        torch.save(store.state_dict(), f"{args.output_dir}/store{rank}.pt")
    Path(args.output_dir, f"done{rank}.json").write_text(json.dumps(sys.argv))
    if torch.distributed.is_initialized():
        # Threads of a process group can abort a process that has done its work as it exits.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
