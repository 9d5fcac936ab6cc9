"""What the training scripts share: arguments, data sources, training, report."""
