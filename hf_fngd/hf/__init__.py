"""What runs while a Trainer trains; with `report`, the only package that imports transformers.

`registry` makes `--optim fngd` and the other names known, `callback` runs a method inside any
Trainer, `samples` says which data set rows a batch holds, `trainer` has the Trainers that pass row
numbers along, and `checkpoints` finds what can be resumed. Read `callback` first. Nothing here
asks what method it serves: a method says what it needs (`needs_rows`, `needs_loss_scale`,
`accepts_packed_rows`, `needs_whole_gradients`).
"""
