"""The rooms that know transformers: optimizer names, trainers, sample ids, logs, model cards."""
