"""What all optimizers of the package share: selection, parameter groups, update rules, state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_fngd import capture
from hf_fngd.batches import BatchTracker
from hf_fngd.checks import check_number
from hf_fngd.errors import FNGDError
from hf_fngd.handlers import LayerHandler
from hf_fngd.layers import LinearAdapter
from hf_fngd.parameter_groups import divide
from hf_fngd.selection import Selection, select_layers
from hf_fngd.settings import OptimizerConfig
from hf_fngd.update_rules import apply_rule


class LayerOptimizer(torch.optim.Optimizer):
    """An update rule for the selected layers, AdamW for the rest, and a hold on the layers.

    Momentum and decoupled weight decay come after any preconditioning, in every method alike.

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
    # Name of the method in `--optim`, log series and checkpoints.
    method: ClassVar[str]
    config: Any
    tracker: BatchTracker[Any]

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
            if not isinstance(value, Tensor):
                check_number(name, value, False, {"at least": 0})
        self.config = config
        self.selection = self._select(module)
        nesterov = config.update_rule == "muon" if config.nesterov is None else config.nesterov
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": config.momentum,
            "nesterov": nesterov and config.momentum > 0,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_epsilon,
            "update_scale": config.update_scale,
        }
        groups = divide(params, self.selection, config.update_rule, config.other_lr)
        super().__init__(groups, defaults)
        self._set_up(module)
        self.attach()

    def _set_up(self, module: nn.Module) -> None:
        """Makes the method's own state, `tracker` among it; settings and layers are known."""
        raise NotImplementedError

    def _select(self, module: nn.Module) -> Selection:
        return select_layers(module, self.config.target_modules, self.config.exclude_modules)

    # ---- capture -----------------------------------------------------------------------------

    def _handler(self, number: int, adapter: LinearAdapter) -> LayerHandler:
        raise NotImplementedError

    def attach(self) -> None:
        """Puts the selected layers under capture; does nothing where they already are."""
        for number, (module, adapter) in enumerate(self.selection.chosen.values()):
            handler = self._handler(number, adapter)
            capture.attach(module, capture.Capture(number, adapter, handler))

    def detach(self) -> None:
        """Takes all layers out of capture; the model is as it was before."""
        for module, _ in self.selection.chosen.values():
            capture.detach(module)
        self.tracker.forget_batch()

    def start_epoch(self, epoch: int) -> None:
        """Enters an epoch. Under `torch.distributed` all ranks must call it together.

        Args:
            epoch: Number of the epoch, from 0.
        """

    def set_batch(
        self, sample_ids: Sequence[int] | Tensor | None = None, labels: Any = None
    ) -> None:
        """Announces the samples of the next forward pass, once per micro-batch.

        Args:
            sample_ids: Data set rows `[N]` of the batch, or any 64-bit integers that identify its
                samples.
            labels: Class labels `[N]`, token labels `[N, T]`, or a mapping from regular
                expressions on layer paths to such tensors.
        """

    # ---- optimizer ---------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters by their (preconditioned) gradients.

        Args:
            closure: Optional, as in torch: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._precondition()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                apply_rule(group["rule"], params, [self.state[p] for p in params], group)
        self.tracker.end_step()
        return loss

    def _precondition(self) -> None:
        """Changes gradients before the update; FNGD has done so in backward."""

    def statistics(self) -> dict[str, Any]:
        """Reports on what happened since the last call.

        Returns:
            Numbers by name.
        """
        return {
            "damping": float(self.config.damping),
            "layers": float(len(self.tracker.names) - len(self.tracker.left_out)),
            "layers_left_out": float(len(self.tracker.left_out)),
        }

    def bind_dataset(self, num_samples: int | None, fingerprint: str | None) -> None:
        """Says which data the sample ids belong to, so that a resumed run is checked against it.

        Args:
            num_samples: Rows of the data set, if it has a length.
            fingerprint: Any text that changes with the data.
        """

    def synchronize(self) -> None:
        """Makes what a checkpoint holds equal on all ranks, which must call it together."""

    # ---- state -------------------------------------------------------------------------------

    def _method_state(self) -> dict[str, Any]:
        """Gives the method's part of the state.

        Returns:
            Tensors and builtins, with `config` and `layers` among them.
        """
        return {"config": self.config.to_dict(), "layers": list(self.tracker.names)}

    def _load_method_state(self, saved: dict[str, Any]) -> None:
        """Restores what `_method_state` gave; config and layers have been checked."""

    def state_dict(self) -> dict[str, Any]:
        """Gives the optimizer's state with that of the method under its name.

        Returns:
            Tensors and builtins only, readable with `torch.load(weights_only=True)`.
        """
        state = super().state_dict()
        state[self.method] = self._method_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state; moments keep their saved precision, whatever the parameters'.

        Args:
            state_dict: What `state_dict` gave.

        Raises:
            FNGDError: If the state belongs to another optimizer, other settings, other layers or
                other data.
        """
        saved = state_dict.get(self.method)
        if not isinstance(saved, dict) or not {"config", "layers"} <= saved.keys():
            raise FNGDError(
                f"the checkpoint's optimizer state is not {self.config.title}'s: resume with the "
                "optimizer that wrote it, or start without the checkpoint"
            )
        for name in self.config.resumed_fields():
            old, new = saved["config"].get(name), getattr(self.config, name)
            if old != new:
                raise FNGDError(
                    f"the checkpoint was written with {name}={old}, this run has {name}={new}: "
                    "resume with the same settings, or start without the checkpoint"
                )
        if saved["layers"] != self.tracker.names:
            different = sorted(set(saved["layers"]) ^ set(self.tracker.names))
            raise FNGDError(
                f"the checkpoint was written with other selected layers (differing: "
                f"{', '.join(different[:5]) or 'their order'}): resume with the same "
                "target_modules and exclude_modules, or start without the checkpoint"
            )
        plain = {k: v for k, v in state_dict.items() if k != self.method}
        try:
            self._load_method_state(saved)
            super().load_state_dict(copy.copy(plain))
        except KeyError as missing:
            raise FNGDError(
                f"the checkpoint's optimizer state has no {missing}, as if another version of "
                "hf_fngd had written it: resume with that version, or start without the checkpoint"
            ) from None
        # torch casts moments to the parameter's dtype; put the saved ones back.
        members = [p for group in self.param_groups for p in group["params"]]
        order = [i for group in plain["param_groups"] for i in group["params"]]
        for number, param in zip(order, members, strict=True):
            for key, value in plain["state"].get(number, {}).items():
                device = "cpu" if key == "step" else param.device
                self.state[param][key] = value.detach().clone().to(device)
