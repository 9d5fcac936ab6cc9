"""Reports on a training run: model card, Hub upload, pictures, and three commands.

Start with `card.py`: it turns the facts of a run into a model card, through `card.md.jinja`.
`runs.py` reads what a finished run left in its folder, `plots.py` draws it, and `hub.py` uploads
it. `compare.py`, `explain.py` and `rank.py` are the commands `python -m hf_fngd compare` and so on.

These modules import the optimizers and `hf_fngd.hf`. Neither imports them back, so a change here
cannot change a training step.
"""
