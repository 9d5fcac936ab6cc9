"""`LayerMethod`: the layer half of a method, which runs in the backward pass of a captured layer.

A method takes part in one of two ways, which `Batch.fresh` decides when the batch opens:

* fresh: the method gets all calls of a forward pass at once and returns the layer's gradients
  (`LayerMethod.gradients`), plain ones where it only observes;
* known weights: each call is weighted by itself (`LayerMethod.weights`).

The optimizer half is `hf_fngd.optimizer.LayerOptimizer`.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_fngd.capture.batches import Batch, Batches
from hf_fngd.layers import LayerType
from hf_fngd.layers.calls import Call, sum_gradients


class LayerMethod:
    """What a method does in the backward pass of one layer; each method derives its own.

    The optimizer is referred to weakly, so that a model never keeps its optimizer alive.

    Args:
        optimizer: The optimizer; it has `batches`.
        number: Number of the layer among the captured ones.
        module: The layer.
        kind: The layer's type.
    """

    # Whether the method can stay inside a graph of torch.compile; otherwise the graph breaks.
    in_graph: ClassVar[bool] = False
    # Whether a gradient has come through the layer in this step, and whether all are plain from
    # now on.
    delivered = left_out = False
    # Whether a batch has shown that the first dimension is the batch, and not the positions.
    rows_are_sure = False

    def __init__(self, optimizer: Any, number: int, module: nn.Module, kind: LayerType) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.batches: Batches = optimizer.batches
        self.number, self.kind = number, kind
        self._module = weakref.ref(module)
        self.name = self.batches.names[number]
        # Key of the layer in compiled graphs, from `attach`.
        self.key: Tensor | None = None
        # Whether the layer breaks them. Not looked up by its number, which Dynamo would compile
        # into the graph: equal blocks could not share one.
        self.gated = False
        # Whether its forward passes are not captured any more.
        self.skipped = False
        # See `capture.watch`: the present one, and the last backward pass with calls outside it.
        self.watch: Any = None
        self.weighted_alone = -1

    @property
    def optimizer(self) -> Any:
        """The optimizer; None once it has gone, and gradients are plain from then on."""
        return self._optimizer()

    def parameters(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the module's weight and bias, None for what it has not."""
        module = self._module()
        if module is None:
            return None, None
        return module._parameters.get("weight"), module._parameters.get("bias")

    def takes(self, batch: Batch, calls: list[Call]) -> bool:
        """Decide whether the method handles these calls; otherwise their gradient is plain.

        Args:
            batch: The batch.
            calls: All calls of a fresh batch, or one of another.

        Returns:
            False if the optimizer is gone, the layer is left out, or its rows are not samples.
        """
        self.delivered = True
        return (
            self.optimizer is not None
            and not self.left_out
            and self.batches.judge(batch, self, calls)
        )

    def leave_out(self, why: str) -> None:
        """Give the layer its plain gradient from now on, and forget what is known of it.

        Args:
            why: The reason, for the warning.
        """
        if not self.left_out:
            self.left_out = True
            self.batches.leave_out(self, why)
            self.forget()

    def forget(self) -> None:
        """Drop what the method keeps of the layer; by default there is nothing."""

    def weights(self, batch: Batch, call: Call) -> Tensor:
        """Look up the weights of one call, in a batch that is not fresh.

        Args:
            batch: The batch.
            call: The call.

        Returns:
            γ `[N]`, or `[N, T]`.
        """
        raise NotImplementedError(f"{type(self).__name__} opened a batch that is not fresh")

    def gradients(
        self, batch: Batch, calls: list[Call], bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the parameter gradients of all calls of one forward pass, in a fresh batch.

        Args:
            batch: The batch.
            calls: The calls.
            bias: Whether the bias gradient is wanted.

        Returns:
            Weight gradient in the weight's layout, and the bias gradient or None; by default the
            plain ones.
        """
        return sum_gradients(self.kind, calls, bias)

    def count_delivery(self, batch: Batch, each: str) -> bool:
        """Count a backward pass of the layer, and warn where it is not the batch's first.

        Args:
            batch: The batch.
            each: What became of each of the passes, for the warning.

        Returns:
            Whether it is the batch's first.
        """
        first = self.number not in batch.delivered
        if not first:
            self.batches.warn_once(
                self.name,
                f"had two backward passes for one batch, each {each}; where checkpointed blocks "
                "share it, set use_reentrant=False",
            )
        batch.delivered.add(self.number)
        return first
