"""Reading of one image: from a row of the data to pixels of the right size."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch
from common.arguments import InputError
from torch import Tensor

GREY = ("1", "L", "LA")


class ImageReader:
    """Read a row's image as uint8 `[channels, height, width]`.

    Args:
        split: Name of the split, for errors.
        rows: A data set with the column `image`.
        size: Height and width that every image has or gets from the processor.
        channels: 1 or 3.
        processor: An image processor that scales images to the size; None: they must have it.
    """

    def __init__(
        self,
        split: str,
        rows: datasets.Dataset,
        size: tuple[int, int],
        channels: int,
        processor: Any = None,
    ) -> None:
        self.split, self.rows, self.size = split, rows, size
        self.channels, self.processor = channels, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, number: int) -> Tensor:
        """Read one row.

        Args:
            number: Number of the row.

        Returns:
            Pixels.

        Raises:
            InputError: If the image has another size or cannot be used.
        """
        image = open_image(self.split, self.rows, number)
        if self.channels == 1 and image.mode not in GREY:
            raise InputError(
                f"row {number} of the {self.split} set is a colour image, and the first one is "
                "grey: give --num_channels 3"
            )
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.processor is not None:
            return resized(self.processor, image)
        if (image.height, image.width) != self.size:
            raise InputError(
                f"row {number} of the {self.split} set is an image of {image.width}x{image.height}"
                f" pixels, the first one has {self.size[1]}x{self.size[0]}: give --image_size"
            )
        pixels = np.array(image, dtype=np.uint8)
        return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def resized(processor: Any, image: Any) -> Tensor:
    """Scale an image by an image processor.

    Args:
        processor: An image processor.
        image: A PIL image.

    Returns:
        uint8 `[channels, height, width]`.
    """
    done = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
    return done["pixel_values"][0].round().clamp(0, 255).to(torch.uint8)


def open_image(split: str, rows: datasets.Dataset, number: int) -> Any:
    """Decode one image.

    Args:
        split: Name of the split, for errors.
        rows: A data set with the column `image`.
        number: Number of the row.

    Returns:
        A PIL image.

    Raises:
        InputError: If the row has no image of 8 bits a channel.
    """
    where = f"row {number} of the {split} set"
    try:
        image = rows[number]["image"]
    except (OSError, ValueError, SyntaxError) as error:
        reason = " ".join(str(error).split())
        if "both are None" in reason:
            reason = "it is empty"
        raise InputError(f"{where} has an image that cannot be read, remove it: {reason}") from None
    if image is None:
        raise InputError(f"{where} has no image, remove it")
    if image.mode.startswith("I") or image.mode == "F":
        raise InputError(f"{where} has more than 8 bits a channel (mode {image.mode}): convert it")
    return image
