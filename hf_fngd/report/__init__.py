"""Reports on a training run: model card, Hub upload, pictures, and the two commands.

Start with `card.py`. It turns the facts of a run into a model card through `card.md.jinja`. `runs.py`
reads what a finished run left in its folder, `plots.py` draws it, `hub.py` uploads it. `compare.py`
and `explain.py` are the commands `python -m hf_fngd compare` and `explain`.

The modules here import the optimizers and `hf_fngd.hf`. Nothing imports them back, so that a change
here cannot affect a training step.
"""
