"""The model and its image processor: pretrained, or a ResNet-18 for small images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.arguments import InputError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
)

try:
    # In newer versions of transformers the processor without torchvision has this name.
    from transformers import ViTImageProcessorPil as ViTImageProcessor
except ImportError:
    from transformers import ViTImageProcessor

from images.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification

AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification)
# A saved model then loads without this repository.
CifarResNetConfig.register_for_auto_class()
CifarResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")


@dataclass
class ModelArguments:
    """A pretrained model, or the width of a ResNet-18 trained from scratch."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or local folder. Default: a new ResNet-18 for small images."},
    )
    width: int = field(
        default=64,
        metadata={
            "help": "New ResNet: channels of the first stage; each later stage doubles them."
        },
    )


def load_processor(args: ModelArguments) -> Any:
    """Load the image processor of a pretrained model.

    Args:
        args: Model arguments, with a name.

    Returns:
        The processor.

    Raises:
        InputError: If there is none.
    """
    name = args.model_name_or_path
    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot load --model_name_or_path {name!r}: {reason}") from None


def new_processor(size: tuple[int, int]) -> ViTImageProcessor:
    """Create the image processor of a new model, for its later users.

    Args:
        size: Height and width.

    Returns:
        A processor that can be saved and loaded like a pretrained one.
    """
    return ViTImageProcessor(size=dict(zip(("height", "width"), size, strict=True)))


def load_model(args: ModelArguments, names: Sequence[str], channels: int) -> PreTrainedModel:
    """Load or create the model.

    Args:
        args: Model arguments.
        names: Class names; a pretrained model with another number of classes gets a new head.
        channels: Number of channels of a new model.

    Returns:
        The model.

    Raises:
        InputError: If there is no such model, it has no head for images, or the width is below 1.
        ValueError: For any other reason that transformers has.
    """
    labels = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }
    name = args.model_name_or_path
    if name is None:
        if args.width < 1:
            raise InputError(f"--width must be 1 or more, not {args.width}")
        config = CifarResNetConfig(
            num_channels=channels,
            embedding_size=args.width,
            hidden_sizes=[args.width * factor for factor in (1, 2, 4, 8)],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            **labels,
        )
        return CifarResNetForImageClassification(config)
    try:
        return AutoModelForImageClassification.from_pretrained(
            name, ignore_mismatched_sizes=True, **labels
        )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot load --model_name_or_path {name!r}: {reason}") from None
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise InputError(
            f"{name!r} has no image classification head: choose one such as ResNet or ViT"
        ) from None


def classes_of(args: ModelArguments) -> tuple[list[str], int]:
    """Read the classes and the number of channels of a pretrained model.

    Args:
        args: Model arguments, with a name.

    Returns:
        Class names, and the number of channels.

    Raises:
        InputError: If there is no such model.
    """
    name = args.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot load --model_name_or_path {name!r}: {reason}") from None
    return list(config.id2label.values()), getattr(config, "num_channels", 3)
