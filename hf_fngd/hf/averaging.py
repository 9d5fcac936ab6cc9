"""`AveragingCallback`: a Trainer's run ends with the average of its weights.

With a learning rate that stays high, the average of the last weights is better than any of them,
and in fine-tuning better than a rate that decays to zero (`scripts/plans/finetuning.md`). In a
plain loop, `torch.optim.swa_utils.AveragedModel` computes the same averages.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_fngd import ranks
from hf_fngd.errors import FNGDError, check_number

logger = logging.getLogger(__name__)
_FILE = "averaging.pt"
# Batches from which the statistics of BatchNorm are computed anew.
_BATCHES = 100


class AveragingCallback(TrainerCallback):
    """Averages the trained weights, and puts the average into the model when training ends.

    The average is kept in float32 beside the model (float64 for such weights). Evaluations and
    checkpoints before the end have the weights themselves, so a resumed run ends with the same
    bits. In the last step the average takes their place, before that step's evaluation and save.
    Running statistics of BatchNorm are then computed anew, from up to 100 batches. Works with any
    optimizer, under DDP and with adapters.

    Args:
        start: Share of the training after which averaging begins, in [0, 1).
        every: Steps from one point of the average to the next.
        decay: Decay of an exponential moving average, in (0, 1); None: all points count the same.

    Attributes:
        replaced: Whether the average has taken the place of the last weights.

    Raises:
        FNGDError: For a value out of range.
    """

    def __init__(self, start: float = 0.5, every: int = 1, decay: float | None = None) -> None:
        check_number("start", start, False, {"at least": 0, "below": 1})
        check_number("every", every, True, {"at least": 1})
        if decay is not None:
            check_number("decay", decay, False, {"above": 0, "below": 1})
        self.start, self.every, self.decay = start, every, decay
        self._reset()

    def _reset(self) -> None:
        self.replaced = False
        self._average: AveragedModel | None = None
        # The average by name; when it is in the model, what was there before.
        self._kept: dict[str, Tensor] = {}
        self._ended = False

    @property
    def count(self) -> int:
        """Points in the average."""
        return 0 if self._average is None else int(self._average.n_averaged)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings, which a resumed run must share."""
        return {"start": self.start, "every": self.every, "decay": self.decay}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work, and take up the average of a checkpoint.

        Raises:
            FNGDError: If weights are divided among processes, the best checkpoint would replace the
                average, the training ends before its first point, or a checkpoint lacks it.
        """
        self._reset()
        if args.load_best_model_at_end:
            raise FNGDError(
                "load_best_model_at_end replaces the average of the weights by a checkpoint: turn "
                "one of the two off"
            )
        kind = AcceleratorState._shared_state.get("distributed_type")
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise FNGDError(
                "averaging needs whole weights, which FSDP and DeepSpeed divide: use DDP (torchrun)"
            )
        steps = state.max_steps - self._first(state)
        if self.every > steps:
            raise FNGDError(
                f"the average has no point: it takes one every {self.every} steps, and begins "
                f"{steps} before the end of {state.max_steps}: lower every, or train longer"
            )
        if state.global_step > self._first(state):
            self._load(args, state, kwargs["model"])

    def _first(self, state: TrainerState) -> int:
        """The step after whose end averaging begins."""
        return int(self.start * state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the weights into the average; end with it.

        Raises:
            FNGDError: If other parameters train than when averaging began.
        """
        since = state.global_step - self._first(state)
        if since > 0 and since % self.every == 0:
            self._collect(kwargs["model"])
        # Where it is stopped earlier, this step's checkpoint may be the one to resume from.
        if state.global_step >= state.max_steps:
            self.on_train_end(args, state, control, **kwargs)

    @torch.no_grad()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the average into the model, where `on_step_end` has not done so already."""
        if self._ended or not self.count:
            return
        self._ended = True
        says = logger.warning if state.is_world_process_zero else logger.info
        if not all(bool(average.isfinite().all()) for average in self._kept.values()):
            says("the average of the weights is not finite: the model keeps the last ones")
            return
        model = kwargs["model"]
        self._check(model)
        self._kept |= {name: one.clone() for name, one in _statistics(model).items()}
        self.swap(model)
        _renew_statistics(model, kwargs.get("train_dataloader"))
        says("the model has the average of its weights after %d steps", self.count)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the average into the checkpoint."""
        kept = self.count and not self._ended and not args.save_only_model
        if kept and state.is_world_process_zero:
            content = {"settings": self.settings, "count": self.count, "average": self._kept}
            torch.save(content, _folder(args, state) / _FILE)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the average for the last weights, or these for the average again.

        Args:
            model: The model after training.
        """
        for name, one in (_trained(model) | _statistics(model)).items():
            before = one.detach().clone()
            one.copy_(self._kept[name])
            self._kept[name].copy_(before)
        self.replaced = not self.replaced

    def _check(self, model: nn.Module) -> None:
        if self._kept.keys() != _trained(model).keys():
            raise FNGDError(
                "other parameters train than when averaging began: freeze, thaw, add or merge "
                "layers before that, or after the training"
            )

    def _load(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        given = args.resume_from_checkpoint
        folders = [_folder(args, state), *([Path(given)] if isinstance(given, str) else [])]
        files = [folder / _FILE for folder in folders if (folder / _FILE).is_file()]
        if not files:
            if state.global_step - self._first(state) < self.every:
                return
            raise FNGDError(
                f"there is no {_FILE} in {str(folders[-1])!r}: resume from a checkpoint that was "
                "written during averaging, in the same output_dir, or start without one"
            )
        saved = torch.load(files[-1], map_location="cpu", weights_only=True)
        if saved["settings"] != self.settings:
            raise FNGDError(
                f"the checkpoint was written with averaging by {saved['settings']}, this run has "
                f"{self.settings}: resume with the same settings, or start without the checkpoint"
            )
        self._begin(model)
        if saved["average"].keys() != self._kept.keys():
            raise FNGDError(
                "the checkpoint has the average of other parameters: resume with the same model, "
                "or start without the checkpoint"
            )
        for name, average in self._kept.items():
            average.copy_(saved["average"][name])
        assert self._average is not None
        self._average.n_averaged.fill_(saved["count"])

    def _collect(self, model: nn.Module) -> None:
        if self._average is None:
            self._begin(model)
        assert self._average is not None
        self._check(model)
        self._average.update_parameters(_points(model))

    def _begin(self, model: nn.Module) -> None:
        update = None if self.decay is None else get_ema_multi_avg_fn(self.decay)
        self._average = AveragedModel(_points(model), multi_avg_fn=update)
        averages = (p.detach() for p in self._average.module.parameters())
        self._kept = dict(zip(_trained(model), averages, strict=True))


def _points(model: nn.Module) -> nn.ParameterList:
    """Return the trained weights, at least in float32."""
    weights = [p.detach() for p in _trained(model).values()]
    wide = [w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights]
    return nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in wide)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers that keep running statistics, by path."""
    found = {path: one for path, one in model.named_modules() if isinstance(one, _BatchNorm)}
    return {path: one for path, one in found.items() if one.track_running_stats}


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": one
        for path, layer in _batch_norms(model).items()
        for name, one in layer.named_buffers(recurse=False)
    }


def _renew_statistics(model: nn.Module, loader: Any) -> None:
    """Compute the running statistics of BatchNorm for the present weights."""
    layers = list(_batch_norms(model).values())
    if not layers or loader is None:
        return
    momenta, training = [layer.momentum for layer in layers], model.training
    model.train()
    for layer in layers:
        layer.reset_running_stats()
        # The mean over all batches.
        layer.momentum = None
    device = next(model.parameters()).device
    for batch in itertools.islice(loader, _BATCHES):
        inputs = send_to_device(batch, device)
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*inputs if isinstance(inputs, list | tuple) else [inputs])
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.train(training)
    ranks.average([one for one in _statistics(model).values() if one.is_floating_point()])
