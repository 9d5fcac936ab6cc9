"""`LayerOptimizer`: what all optimizers of the package share, and the optimizer half of a method.

A method is a subclass of `LayerOptimizer` and, where it takes part in backward, a subclass of
`capture.LayerMethod`, one object for each layer. The optimizer half says what happens

* when a batch opens (`new_batch`): its samples, and whether it is fresh;
* before the update (`precondition`), for methods that work on whole gradients;
* after it (`end_step`), and when an epoch begins (`start_epoch`);
* in logs (`statistics`) and in checkpoints (`method_state`, `load_method_state`).

Every one of them has a default, with which the optimizer is its plain update rule.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_fngd import capture, ownership, states
from hf_fngd.capture import Batch, Batches, LayerMethod
from hf_fngd.config import OptimizerConfig, refuse_arguments_of_torch
from hf_fngd.errors import FNGDError, check_number
from hf_fngd.layers.selection import divide, select_layers
from hf_fngd.rules import NAMES, apply_rule, place
from hf_fngd.scale import GradientScale

logger = logging.getLogger(__name__)


class LayerOptimizer(torch.optim.Optimizer):
    """An update rule for the selected layers and one for the rest, after any preconditioning.

    Momentum and decoupled weight decay follow the preconditioning, in every method alike.

    Args:
        params: Parameters or parameter groups, as for any optimizer.
        lr: Learning rate of the selected weights.
        module: The model whose layers are selected and attached.
        config: Settings; or give them as keyword arguments.
        weight_decay: Decoupled weight decay of groups that do not name their own.
        **settings: Fields of the method's config.

    Raises:
        FNGDError: For bad settings, or if no layer can be selected.
    """

    config_class: ClassVar[type[OptimizerConfig]]
    # The layer half of the method; None if it captures no layer.
    layer_class: ClassVar[type[LayerMethod] | None] = None
    # Name of the method in `--optim` and in checkpoints.
    method: ClassVar[str]
    # Whether a batch of one row may hold several samples.
    accepts_packed_rows: ClassVar[bool] = True
    # Whether gradients are weighted in the backward pass, and no other optimizer may use them.
    weights_gradients: ClassVar[bool] = False
    # Whether `precondition` needs whole gradients, which FSDP and DeepSpeed divide or hide.
    needs_whole_gradients: ClassVar[bool] = False
    config: Any
    # Each captured layer with its layer half, in model order.
    captured: list[tuple[nn.Module, Any]]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        module: nn.Module,
        config: OptimizerConfig | None = None,
        weight_decay: float = 0.0,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise FNGDError(
                f"give either config={self.config_class.__name__}(...) or single settings, not both"
            )
        config = config or self.config_class.from_settings(settings)
        if type(config) is not self.config_class:
            raise FNGDError(
                f"{type(self).__name__} takes config={self.config_class.__name__}(...), not a "
                f"{type(config).__name__}"
            )
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            check_number(name, value, False, {"at least": 0})
        self.config = config
        self.selection = select_layers(module, config.target_modules, config.exclude_modules)
        self.layer_names = list(self.selection.chosen)
        self.batches = Batches(self.layer_names, config.title)
        # Present epoch, and optimizer steps so far.
        self.epoch = self.steps = 0
        self.scale = GradientScale()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": config.momentum,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_epsilon,
            "update_scale": config.update_scale,
        }
        super().__init__(self._divide(params), defaults)
        self.set_up(module)
        self.captured = []
        if self.layer_class is not None:
            self.captured = [
                (layer, self.layer_class(self, number, layer, kind))
                for number, (layer, kind) in enumerate(self.selection.chosen.values())
            ]
        self._root = weakref.ref(module)
        self._first_look: Any = None
        # A model whose optimizer is gone trains plainly.
        weakref.finalize(self, _detach, self.captured).atexit = False
        self.attach()

    def set_up(self, module: nn.Module) -> None:
        """Make the method's own state, before the layers' halves; settings and layers are known."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it is divided as those of the constructor are.

        Args:
            param_group: Parameters under `params`, and settings that differ.

        Raises:
            FNGDError: For an argument that only torch's optimizers have.
        """
        if isinstance(param_group, dict):
            refuse_arguments_of_torch(param_group)
        if not isinstance(param_group, dict) or "rule" in param_group:
            super().add_param_group(param_group)
            return
        before = len(self.param_groups)
        for group in self._divide([param_group]):
            super().add_param_group(group)
        chosen = {id(p) for p in self.selection.parameters()}
        added = [p for group in self.param_groups[before:] for p in group["params"]]
        if any(p.dim() > 1 and id(p) not in chosen for p in added):
            logger.warning(
                "%s: %s updates weights that were added now, since layers are selected when the "
                "optimizer is made: make the optimizer anew to select more of them",
                self.config.title,
                NAMES[self.config.other_rule],
            )

    def _divide(self, params: Iterable[Any]) -> list[dict[str, Any]]:
        own = self.config
        return divide(params, self.selection, own.update_rule, own.other_lr, own.other_rule)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise FNGDError(
            f"{self.config.title} cannot be copied or pickled, because it is attached to a model: "
            "make a new optimizer for the copy, and load this one's state_dict() into it"
        )

    # ---- capture -----------------------------------------------------------------------------

    @property
    def layers(self) -> list[Any]:
        """The layer half of each captured layer, in model order."""
        return [layer for _, layer in self.captured]

    def attach(self) -> None:
        """Put the selected layers under capture; does nothing where they already are."""
        for module, layer in self.captured:
            capture.attach(module, layer)
        if self.weights_gradients:
            ownership.claim(self)
        root, unsure = self._root(), not all(layer.rows_are_sure for layer in self.layers)
        if self._first_look is None and root is not None and unsure:
            look = ownership.FirstLook(self)
            self._first_look = look.hook = root.register_forward_pre_hook(look, with_kwargs=True)
            weakref.finalize(self, look.hook.remove).atexit = False

    def detach(self) -> None:
        """Take all layers out of capture; the model is as it was before."""
        _detach(self.captured)
        self.batches.close()
        ownership.release(self)
        if self._first_look is not None:
            self._first_look.remove()
            self._first_look = None

    # ---- what a training loop says -------------------------------------------------------------

    @property
    def needs_rows(self) -> bool:
        """Whether `set_batch` must be given ids that are the same in every epoch."""
        return False

    @property
    def needs_loss_scale(self) -> bool:
        """Whether the scale of the loss changes the step, see `set_loss_scale`."""
        return False

    @property
    def reuse_rate(self) -> float | None:
        """Share of this epoch's samples whose coefficients were looked up and found; or None."""
        return None

    def start_epoch(self, epoch: int) -> None:
        """Enter an epoch. Under `torch.distributed` all ranks must call it together.

        Args:
            epoch: Number of the epoch, from 0.

        Raises:
            FNGDError: For a negative number.
        """
        if epoch < 0:
            raise FNGDError(f"epochs are counted from 0, there is no epoch {epoch}")
        self.epoch = epoch

    def set_batch(
        self,
        sample_ids: Sequence[int] | Tensor | None = None,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Announce the samples of the next forward pass, once per micro-batch.

        Args:
            sample_ids: Data set rows `[N]` of the batch, or any 64-bit integers that identify its
                samples. FNGD needs them for share=sample; otherwise they tell the batch size.
            lengths: For a batch of one row that holds several samples one after the other: the
                positions `[N]` of each.

        Raises:
            FNGDError: If the method needs what is missing, or samples and lengths do not agree.
        """
        if isinstance(sample_ids, Tensor) and sample_ids.dim() != 1:
            # The ids of a last batch of one row may come without their dimension.
            if sample_ids.numel() != (len(sample_ids) if sample_ids.dim() else 1):
                raise FNGDError(f"sample_ids must have the shape [N], not {[*sample_ids.shape]}")
            sample_ids = sample_ids.reshape(-1)
        size = None if sample_ids is None else len(sample_ids)
        if isinstance(lengths, Tensor):
            lengths = lengths.cpu()
        packed = None if lengths is None else [int(length) for length in lengths]
        if packed is not None:
            if not self.accepts_packed_rows:
                raise FNGDError(
                    "the batch is one packed row of several samples, which "
                    f"{self.config.title} cannot tell apart: turn packing or padding_free off, so "
                    "that each sample has its own row"
                )
            if size not in (None, len(packed)) or min(packed, default=0) < 1:
                raise FNGDError(
                    f"{size} samples and lengths {packed}: give each sample of a packed row its "
                    "length, at least 1"
                )
            size = len(packed)
        self.batches.open(self.new_batch(sample_ids, size, packed))

    def new_batch(
        self,
        sample_ids: Sequence[int] | Tensor | None,
        size: int | None,
        lengths: list[int] | None,
    ) -> Batch:
        """Make the batch of `set_batch`.

        Args:
            sample_ids: Ids as given.
            size: Number of samples, if known.
            lengths: Positions of each sample of a packed row.

        Returns:
            The batch.
        """
        return Batch(size, self.batches.fresh, lengths)

    def set_loss_scale(self, micro_batches: int = 1, scale: float = 1.0) -> None:
        """Say how gradients relate to those of single samples, for the next backward passes.

        KFAC, EKFAC, Eva, TENGraD and SENG find both by themselves, except under clipping by more
        than a half with a scaler; FNGD with absolute damping has to be told.

        Args:
            micro_batches: Micro-batches of an update, by whose number their loss is divided.
            scale: Factor by which the loss is multiplied, as by a GradScaler.
        """
        self.scale.tell(micro_batches, scale)

    def bind_dataset(self, num_samples: int | None, fingerprint: str | None = None) -> None:
        """Say which data the sample ids belong to, so that a resumed run is checked against it.

        Args:
            num_samples: Rows of the data set, if it has a length.
            fingerprint: Any text that changes with the data.
        """

    def synchronize(self, counts: bool = False) -> None:
        """Make the content of a checkpoint equal on all ranks, which must call it together.

        Args:
            counts: Only add up what the next `statistics` reports.
        """

    # ---- the step ------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and what was seen of a step that did not come.

        Args:
            set_to_none: As in torch.
        """
        super().zero_grad(set_to_none)
        self.scale.forget_step()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters by their (preconditioned) gradients.

        Args:
            closure: Optional, as in torch: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._find_missed()
        self.precondition()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                apply_rule(group["rule"], params, [self.state[p] for p in params], group)
        self.end_step()
        return loss

    def _find_missed(self) -> None:
        """Leave out the layers whose gradient did not come through their forward pass."""
        if not self.batches.active:
            return
        missed = [
            layer
            for layer in self.layers
            if not (layer.delivered or layer.left_out)
            and (grad := getattr(layer.parameters()[0], "grad", None)) is not None
            and bool(grad.any())
        ]
        if missed and not any(layer.delivered for layer in self.layers):
            # Gradients may be given by hand.
            self.batches.warn_once(
                "no layer", "had a gradient that came through its forward pass in this step"
            )
            return
        for layer in missed:
            layer.leave_out(
                "its gradient does not come through its forward pass, which something else has "
                "replaced"
            )
        for layer in self.layers:
            layer.delivered = False

    def precondition(self) -> None:
        """Change `.grad` of the selected layers, accumulated and averaged over ranks by then."""

    def end_step(self) -> None:
        """Close the step: the next forward pass belongs to another batch."""
        self.batches.close()
        self.scale.forget_step()
        self.steps += 1

    # ---- logs and checkpoints ------------------------------------------------------------------

    @property
    def series(self) -> str:
        """Name of the optimizer in logs."""
        return self.method

    def statistics(self) -> dict[str, Any]:
        """Report on what happened since the last call.

        Returns:
            Numbers by name: `layers`, and `layers_dropped` (selected layers that have their plain
            gradient, because their rows are not samples or part of it cannot be captured).
        """
        dropped = len(self.batches.left_out | self.batches.unfit)
        return {
            "layers": float(len(self.layer_names) - dropped),
            "layers_dropped": float(dropped),
        }

    def method_state(self) -> dict[str, Any]:
        """Return the method's part of a checkpoint: tensors and builtins."""
        return {}

    def load_method_state(self, saved: dict[str, Any]) -> None:
        """Restore what `method_state` returned; settings and layers have been checked.

        Args:
            saved: The method's part of a checkpoint, with `steps`, which the optimizer takes over
                when all has been loaded.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, with that of the method under its name.

        Returns:
            Only tensors and builtins, readable with `torch.load(weights_only=True)`.
        """

        def add(_: Any, state: dict[str, Any]) -> None:
            states.add(self, state)

        # Before the user's hooks, which see all of it.
        handle = self.register_state_dict_post_hook(add, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, in the precision of updates: float32 under bf16 and fp16 parameters.

        Args:
            state_dict: The result of `state_dict`.

        Raises:
            FNGDError: If the state belongs to another optimizer, another version of the package,
                other settings, other layers or other data.
        """
        plain: dict[str, Any] = {}

        def take(_: Any, state: dict[str, Any]) -> dict[str, Any]:
            rest, saved, steps = states.take(self, state)
            try:
                for what in states.DECISIONS:
                    for layer, known in zip(self.layers, saved[what], strict=True):
                        setattr(layer, what, known)
                for layer in self.layers:
                    layer.skipped = layer.left_out
                self.batches.left_out = {one.name for one in self.layers if one.left_out}
                self.load_method_state(saved)
            except KeyError as missing:
                raise FNGDError(
                    states.other_version(f"no {missing} in its optimizer state")
                ) from None
            self.steps = steps
            plain.update(rest)
            return plain

        def put_back(_: Any) -> None:
            # torch has cast moments to the parameter's own dtype.
            members = [p for group in self.param_groups for p in group["params"]]
            order = [i for group in plain["param_groups"] for i in group["params"]]
            for number, param in zip(order, members, strict=True):
                for key, value in plain["state"].get(number, {}).items():
                    self.state[param][key] = place(key, value, param)

        # Between the user's hooks.
        first = self.register_load_state_dict_pre_hook(take)
        last = self.register_load_state_dict_post_hook(put_back, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            first.remove()
            last.remove()


def _detach(captured: list[tuple[nn.Module, LayerMethod]]) -> None:
    for module, layer in captured:
        capture.detach(module, layer)
