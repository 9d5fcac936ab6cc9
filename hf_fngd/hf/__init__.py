"""What runs while a Trainer trains; with `report`, the only package that imports transformers.

`registry` makes `--optim fngd` and the other names known, `callback` runs a method inside any
Trainer, `row_numbers` keeps the numbers of a batch's rows beside it, `samples` says which samples a
batch holds, `trainer` has the Trainers that follow samples by row number, and `checkpoints` finds
what can be resumed. Read `callback` first. Nothing here asks what method it serves: a method says
what it needs (`needs_rows`, `needs_loss_scale`, `accepts_packed_rows`, `needs_whole_gradients`).
"""
