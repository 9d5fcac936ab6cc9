"""Modules of run_image_classification.py: data and labels, pixels, model, metrics."""
