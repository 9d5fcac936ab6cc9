"""Modules of run_clm.py: arguments and data, model and tokenizer, perplexity."""
