"""Modules of run_summarization.py: arguments and data, metric."""
