"""The rooms of compare_optimizers.py: plan, search, runs, report and curves."""
