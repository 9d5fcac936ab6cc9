"""Capture of a layer's forward and backward pass: where a method gets at inputs and gradients.

`layer_method` defines the layer half of a method: read it first. `batches` knows which samples the
running forward pass holds, `hook` puts a layer under capture, and `compiled` does the same inside
graphs of `torch.compile`. `watch` finds gradients that went another way, and
`order` which dimension is the batch. A new method needs no change here.
"""

from hf_fngd.capture.batches import Batch, Batches
from hf_fngd.capture.hook import attach, detach, owner
from hf_fngd.capture.layer_method import LayerMethod
from hf_fngd.capture.order import find_order

__all__ = ["Batch", "Batches", "LayerMethod", "attach", "detach", "find_order", "owner"]
