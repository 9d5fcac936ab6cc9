"""Capture of a layer's forward and backward pass: where a method gets at inputs and gradients.

`batches` knows which samples the running forward pass holds, `hook` puts a layer under capture and
defines `LayerMethod`, the part of a method that runs inside backward, and `compiled` is the same
for graphs of `torch.compile`. Read `hook` first. A new method needs no change here.
"""

from hf_fngd.capture.batches import Batch, Batches
from hf_fngd.capture.hook import LayerMethod, attach, detach

__all__ = ["Batch", "Batches", "LayerMethod", "attach", "detach"]
