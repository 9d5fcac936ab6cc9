"""Parts of compare_optimizers.py: plan, search, runs, results and report."""
