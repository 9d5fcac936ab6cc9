"""Modules of run_translation.py: arguments and data, model and tokenizer, metrics."""
