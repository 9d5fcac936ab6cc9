"""The rooms of compare_optimizers.py: plan, search, runs and report."""
