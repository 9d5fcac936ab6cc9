"""`FNGD`, the optimizer: puts the layers under capture and updates the parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_fngd import capture
from hf_fngd.config import RESUME_FIELDS, FNGDConfig
from hf_fngd.errors import FNGDError
from hf_fngd.fngd import FNGDState, Labels
from hf_fngd.sample_store import SampleStore
from hf_fngd.selection import select_layers
from hf_fngd.update_rules import apply_rule
from hf_fngd.weighting import LayerState

_STATE_KEY = "fngd"


class FNGD(torch.optim.Optimizer):
    """Fast Natural Gradient Descent (arXiv 2403.03473) for the selected layers, AdamW for the rest.

    The gradients of selected layers are weighted inside their own backward pass, so `.grad` already
    is the natural gradient λ(λI + UUᵀ/N)⁻¹M when `step` sees it; `step` applies the update rule.
    Most users want `create_fngd_optimizer` or the Trainer integration.

    Args:
        params: Parameters or parameter groups, as for any optimizer.
        lr: Learning rate of the selected weights.
        module: The model whose layers are selected and attached.
        config: Settings; or give them as keyword arguments.
        weight_decay: Decoupled weight decay of groups that do not name their own.
        **settings: Fields of `FNGDConfig`.

    Raises:
        FNGDError: For bad settings, or if no layer can be selected.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        module: nn.Module,
        config: FNGDConfig | None = None,
        weight_decay: float = 0.0,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise FNGDError("give either config=FNGDConfig(...) or single settings, not both")
        self.config = config = config or _config(settings)
        self.selection = select_layers(module, config.target_modules, config.exclude_modules)
        self.coefficients = FNGDState(config, list(self.selection.chosen))
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
        super().__init__(self._split(params, lr), defaults)
        self._fingerprint: str | None = None
        self._loaded_fingerprint: str | None = None
        self.attach()

    def _split(self, params: Iterable[Any], lr: float) -> list[dict[str, Any]]:
        """Divides every parameter group into selected weights and the others.

        Returns:
            Groups, those of selected weights first.
        """
        rule = self.config.update_rule
        selected = {
            id(p)
            for module, _ in self.selection.chosen.values()
            for p in module.parameters(recurse=False)
            if rule != "muon" or p.dim() > 1
        }
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        other_lr = self.config.other_lr
        first, second = [], []
        for group in groups:
            members = group["params"]
            members = [members] if isinstance(members, Tensor) else list(members)
            mine = [p for p in members if id(p) in selected]
            rest = [p for p in members if id(p) not in selected]
            if mine:
                first.append({**group, "params": mine, "rule": rule})
            if rest:
                own = {"lr": other_lr} if other_lr is not None else {}
                second.append({**group, **own, "params": rest, "rule": "adamw"})
        return first + second

    # ---- capture -----------------------------------------------------------------------------

    def attach(self) -> None:
        """Puts the selected layers under capture; does nothing where they already are."""
        for number, (module, adapter) in enumerate(self.selection.chosen.values()):
            layer = LayerState(self.coefficients, number, adapter)
            capture.attach(module, capture.Capture(number, adapter, layer))

    def detach(self) -> None:
        """Takes all layers out of capture; the model is as it was before."""
        for module, _ in self.selection.chosen.values():
            capture.detach(module)
        self.coefficients.forget_batch()

    def start_epoch(self, epoch: int) -> None:
        """Enters an epoch: 0 computes coefficients, later ones reuse them (see `refresh_every`).

        Under `torch.distributed` all ranks must call it together, since stores are merged.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.coefficients.start_epoch(epoch)

    def set_batch(
        self, sample_ids: Sequence[int] | Tensor | None = None, labels: Labels | None = None
    ) -> None:
        """Announces the samples of the next forward pass, once per micro-batch.

        Args:
            sample_ids: Data set rows `[N]` of the batch, or any 64-bit integers that identify its
                samples. Needed for share=sample; otherwise they tell the batch size.
            labels: For share=label: classes `[N]`, token labels `[N, T]`, or a mapping from
                regular expressions on layer paths to such tensors, of which the first match counts.

        Raises:
            FNGDError: If `share` needs what is missing.
        """
        self.coefficients.set_batch(sample_ids, labels)

    # ---- optimizer ---------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters by their (weighted) gradients.

        Args:
            closure: Optional, as in torch: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                apply_rule(group["rule"], params, [self.state[p] for p in params], group)
        self.coefficients.end_step()
        return loss

    def statistics(self) -> dict[str, Any]:
        """Reports on the coefficients since the last call.

        Returns:
            `phase` (collect or reuse), `epoch`, `damping`, `layers` and `layers_left_out`,
            `gram_seconds`, counts of non-finite and refactored Gram matrices (`nonfinite`,
            `fallbacks`); where known, `reuse_rate` of the epoch and mean, minimum and maximum of γ.
        """
        state = self.coefficients
        return {
            "phase": "collect" if state.collecting else "reuse",
            "epoch": float(state.epoch),
            "damping": float(self.config.damping),
            "layers": float(len(state.names) - len(state.left_out)),
            "layers_left_out": float(len(state.left_out)),
            **state.statistics.report(),
        }

    def bind_dataset(self, num_samples: int | None, fingerprint: str | None) -> None:
        """Says which data the sample ids belong to, so that a resumed run is checked against it.

        Args:
            num_samples: Rows of the data set, if it has a length.
            fingerprint: Any text that changes with the data.

        Raises:
            FNGDError: If loaded coefficients belong to other data.
        """
        self._check_data(self._loaded_fingerprint, fingerprint)
        self._fingerprint = fingerprint
        store = self.coefficients.store
        if isinstance(store, SampleStore) and store.num_samples is None:
            store.num_samples = num_samples

    def _check_data(self, loaded: str | None, present: str | None) -> None:
        if self.config.share == "sample" and None not in (loaded, present) and loaded != present:
            raise FNGDError(
                f"the checkpoint's coefficients belong to other data ({loaded}, now {present}): "
                "resume with the same data, or start without the checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        """Gives the optimizer's state with the coefficients under `fngd`.

        Returns:
            Tensors and builtins only, readable with `torch.load(weights_only=True)`.
        """
        state = super().state_dict()
        fingerprint = self._fingerprint or self._loaded_fingerprint
        state[_STATE_KEY] = {**self.coefficients.state_dict(), "data": fingerprint}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state; moments keep their saved precision, whatever the parameters'.

        Args:
            state_dict: What `state_dict` gave.

        Raises:
            FNGDError: If the state belongs to another optimizer, other settings, other layers or
                other data.
        """
        saved = state_dict.get(_STATE_KEY)
        if saved is None:
            raise FNGDError(
                "the checkpoint's optimizer state is not FNGD's: resume with the optimizer that "
                "wrote it, or start without the checkpoint"
            )
        for name in RESUME_FIELDS:
            old, new = saved["config"].get(name), getattr(self.config, name)
            if old != new:
                raise FNGDError(
                    f"the checkpoint was written with {name}={old}, this run has {name}={new}: "
                    "resume with the same settings, or start without the checkpoint"
                )
        self._check_data(saved["data"], self._fingerprint)
        self.coefficients.load_state_dict(saved)
        self._loaded_fingerprint = saved["data"]
        plain = {k: v for k, v in state_dict.items() if k != _STATE_KEY}
        super().load_state_dict(copy.copy(plain))
        # torch casts moments to the parameter's dtype; put the saved ones back.
        members = [p for group in self.param_groups for p in group["params"]]
        order = [i for group in plain["param_groups"] for i in group["params"]]
        for number, param in zip(order, members, strict=True):
            for key, value in plain["state"].get(number, {}).items():
                device = "cpu" if key == "step" else param.device
                self.state[param][key] = value.detach().clone().to(device)


def _config(settings: dict[str, Any]) -> FNGDConfig:
    try:
        return FNGDConfig(**settings)
    except TypeError:
        unknown = [name for name in settings if name not in FNGDConfig.__dataclass_fields__]
        raise FNGDError(
            f"{', '.join(unknown)}: not a setting of FNGD; valid names: "
            f"{', '.join(FNGDConfig.__dataclass_fields__)}"
        ) from None


def create_fngd_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, **config: Any
) -> FNGD:
    """Makes an FNGD optimizer for a model and attaches it: the two lines of a plain loop.

        optimizer = create_fngd_optimizer(model, lr=1e-3, update_scale="rms")
        ...
        optimizer.start_epoch(epoch)            # before each epoch
        optimizer.set_batch(sample_ids=rows)    # before each forward pass

    Args:
        model: The model to train.
        lr: Learning rate of the selected weights, and of the others unless `other_lr` is given.
        weight_decay: Decoupled weight decay of parameters with at least two dimensions.
        **config: Fields of `FNGDConfig`.

    Returns:
        The attached optimizer; `detach()` undoes the attachment.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return FNGD(groups, lr, module=model, **config)
