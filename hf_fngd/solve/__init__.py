"""From per-sample gradients to natural-gradient coefficients: pure functions of tensors.

`gram` forms the Gram matrix K of a layer's per-sample gradients, `coefficients` solves for γ. Both
import torch only and know nothing of layers, batches or optimizers.
"""
