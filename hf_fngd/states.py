"""The method's part of an optimizer's state dict: put in, taken out, and checked.

It is under the method's name, and once more in the first group: torch.distributed.checkpoint knows
states of parameters and groups, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_fngd.errors import FNGDError

# What training has shown about a layer (`LayerMethod`), the same after a resume.
DECISIONS = ("left_out", "rows_are_sure")


class Whole(bytes):
    """A method's state as one value, which torch.distributed.checkpoint does not take apart.

    From a dict it would make many values, and want tensors of the sizes that a new optimizer has.
    In a file the state is an attribute of a tensor in a set: `torch.load(weights_only=True)` reads
    that, it is one value again, and shares its tensors with the same state under the method's name.

    Args:
        content: The state.
    """

    content: dict[str, Any]

    def __new__(cls, content: dict[str, Any]) -> Whole:  # noqa: D102
        whole = super().__new__(cls)
        whole.content = content
        return whole

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        carrier: Any = torch.empty(0)
        carrier.content = self.content
        return set, ([carrier],)

    @staticmethod
    def read(value: Any) -> Any:
        """Return the content of a value in memory or from a file; None if it has none."""
        (one,) = value if isinstance(value, set) else (value,)
        return getattr(one, "content", None)


def add(optimizer: Any, state: dict[str, Any]) -> None:
    """Add the method's part.

    Args:
        optimizer: The optimizer.
        state: torch's part of its state dict, changed in place.
    """
    own = {
        "config": optimizer.config.to_dict(),
        "layers": optimizer.layer_names,
        "steps": optimizer.steps,
        **{what: [getattr(layer, what) for layer in optimizer.layers] for what in DECISIONS},
        **optimizer.method_state(),
    }
    state[optimizer.method] = own
    state["param_groups"][0][optimizer.method] = Whole(own)


def take(optimizer: Any, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Take the method's part out, and check that the state belongs to the optimizer.

    Args:
        optimizer: The optimizer.
        state: A state dict; it stays as it is.

    Returns:
        torch's part, the method's part, and the number of steps.

    Raises:
        FNGDError: If the state belongs to another optimizer, another version of the package, other
            settings or other layers.
    """
    config, method = optimizer.config, optimizer.method
    rest = {key: value for key, value in state.items() if key != method}
    rest["param_groups"] = [dict(group) for group in state.get("param_groups", [])]
    carried = [group.pop(method) for group in rest["param_groups"] if method in group]
    saved = state.get(method) or next(map(Whole.read, carried), None)
    if not isinstance(saved, dict) or not {"config", "layers"} <= saved.keys():
        raise FNGDError(
            f"the checkpoint's optimizer state is not {config.title}'s: resume with the optimizer "
            "that wrote it, or start without the checkpoint (torch.distributed.checkpoint: set "
            "flatten_optimizer_state_dict=False)"
        )
    _check_settings(config, saved["config"])
    if saved["layers"] != optimizer.layer_names:
        different = sorted(set(saved["layers"]) ^ set(optimizer.layer_names))
        raise FNGDError(
            f"the checkpoint was written with other selected layers (differing: "
            f"{', '.join(different[:5]) or 'their order'}): resume with the same "
            "target_modules and exclude_modules, or start without the checkpoint"
        )
    for part, name in ((saved, "steps"), (state, "state"), (state, "param_groups")):
        if name not in part:
            raise FNGDError(other_version(f"no {name!r} in its optimizer state"))
    # torch itself adds `differentiable`, which no rule reads.
    wanted = {"rule", *optimizer.defaults} - {"differentiable"}
    for group in rest["param_groups"]:
        if wanted - group.keys():
            missing = sorted(wanted - group.keys())[0]
            raise FNGDError(other_version(f"no {missing!r} in a parameter group"))
    return rest, saved, saved["steps"]


def _check_settings(config: Any, saved: dict[str, Any]) -> None:
    known = config.to_dict()
    gone = sorted(saved.keys() - known.keys())
    if gone:
        raise FNGDError(other_version(f"a setting {gone[0]}"))
    new_ones = sorted(known.keys() - saved.keys())
    if new_ones:
        raise FNGDError(other_version(f"no setting {new_ones[0]}"))
    for name in config.resumed_fields():
        old, new = saved[name], known[name]
        if old != new:
            raise FNGDError(
                f"the checkpoint was written with {name}={old}, this run has {name}={new}: "
                "resume with the same settings, or start without the checkpoint"
            )


def other_version(sign: str) -> str:
    """Say that another version of the package wrote a state.

    Args:
        sign: What it has, or lacks.

    Returns:
        The message.
    """
    return (
        f"the checkpoint was written by another version of hf_fngd (it has {sign}): resume with "
        "that version, or start without the checkpoint"
    )
