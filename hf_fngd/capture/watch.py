"""Whether all of a parameter's gradient went through its layer's capture.

A weight may also be used without its module's forward: a decoder that is its encoder transposed,
code that reads `layer.weight`. Autograd then adds a plain gradient to the weighted one, and the sum
is neither natural nor plain. A hook on the parameter compares what arrives with what the method
returned; where they differ, the sum becomes plain at once and the layer is left out.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from hf_fngd.capture.batches import backward_pass
from hf_fngd.layers.calls import Call, sum_gradients


class Watch:
    """The parameters of a layer during one backward pass.

    Args:
        layer: The layer's method.
    """

    def __init__(self, layer: Any) -> None:
        self.layer, self.number = layer, backward_pass()
        # Calls with the gradients of weight and bias that the method made of them.
        self.parts: list[tuple[list[Call], tuple[Tensor | None, ...]]] = []
        # Parameters whose gradient is on its way, by place: 0 for the weight, 1 for the bias.
        self._hooks: dict[int, Any] = {}
        self._passed: dict[int, Tensor] = {}

    def add(self, calls: list[Call], grads: tuple[Tensor | None, ...]) -> None:
        """Expect gradients at the parameters.

        Args:
            calls: The calls behind the gradients.
            grads: Gradients of weight and bias, as autograd gets them; None where there is none.
        """
        # Not the tensors themselves: autograd would copy a gradient that somebody else has, too.
        own = tuple(None if grad is None else grad.detach() for grad in grads)
        self.parts.append((calls, own))
        for place, leaf in enumerate(self.layer.parameters()):
            missing = grads[place] is None or place in self._hooks
            # A parameter frozen since its forward pass gets no gradient. A hook of the user's may
            # change the gradient before this one sees it.
            if missing or leaf is None or not leaf.is_leaf or not leaf.requires_grad:
                continue
            if leaf._backward_hooks:
                continue
            check = functools.partial(self._check, place, leaf)
            self._hooks[place] = leaf.register_hook(check)

    def end(self) -> None:
        """Stop watching."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._passed.clear()
        self.parts.clear()

    def _check(self, place: int, leaf: Tensor, total: Tensor | None) -> Tensor | None:
        self._hooks.pop(place).remove()
        layer = self.layer
        # Perhaps the pass that this belongs to did not reach the parameter.
        if backward_pass() != self.number or total is None or layer.weighted_alone == self.number:
            self.end()
            return None
        if not layer.left_out and not self._agrees(place, total):
            layer.leave_out("its parameters are also used without its forward pass")
            for other, its_leaf in self._passed.items():
                if its_leaf.grad is not None:
                    its_leaf.grad += self._correction(other, its_leaf.grad)
        if layer.left_out:
            total = total + self._correction(place, total)
        else:
            self._passed[place] = leaf
        if not self._hooks:
            self.end()
        return total

    def _agrees(self, place: int, total: Tensor) -> bool:
        own = self._own(place)
        if len(own) == 1 and total.data_ptr() == own[0].data_ptr():
            return True
        # Sums may be rounded in another order.
        bound = 64 * torch.finfo(total.dtype).eps * max(float(g.abs().max()) for g in own)
        return float((total - sum(own)).abs().max()) <= bound

    def _own(self, place: int) -> list[Tensor]:
        return [grad for _, grads in self.parts if (grad := grads[place]) is not None]

    def _correction(self, place: int, like: Tensor) -> Tensor:
        """Return the plain gradients minus those that the method made of them."""
        correction = -sum(self._own(place), torch.zeros_like(like))
        for calls, _ in self.parts:
            plain = sum_gradients(self.layer.kind, calls, place == 1)[place]
            if plain is not None:
                correction = correction + plain.to(like.dtype)
        return correction


def watch(layer: Any, calls: list[Call], grads: tuple[Tensor | None, ...]) -> None:
    """Compare what reaches a layer's parameters in this backward pass with its own gradients.

    Args:
        layer: The layer's method.
        calls: The calls behind the gradients.
        grads: Gradients of weight and bias, as autograd gets them; None where there is none.
    """
    present: Watch | None = layer.watch
    if present is None or present.number != backward_pass():
        if present is not None:
            present.end()
        present = layer.watch = Watch(layer)
    present.add(calls, grads)
