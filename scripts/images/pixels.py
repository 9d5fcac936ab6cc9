"""From images to batches: decoding, random crops and flips, normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from common.arguments import InputError
from torch import Tensor

from images.data import DataArguments
from images.model import ModelArguments, classes_of, load_processor, new_processor

GREY = ("1", "L", "LA")
IN_MEMORY_BYTES = 2**31
STATISTICS_ROWS = 10_000


class ImageReader:
    """Reads a row's image as uint8 `[channels, height, width]`.

    Args:
        split: Name of the split, for errors.
        rows: A data set with the column `image`.
        size: Height and width that every image must have, or is brought to by the processor.
        channels: 1 or 3.
        processor: An image processor that brings images to the size, or None if they must have it.
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
        """Reads one row.

        Args:
            number: Its number.

        Returns:
            Pixels.

        Raises:
            InputError: If it has another size or cannot be used.
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
    """Brings an image to a processor's size, by the processor itself.

    Args:
        processor: An image processor.
        image: A PIL image.

    Returns:
        uint8 `[channels, height, width]`.
    """
    done = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
    return done["pixel_values"][0].round().clamp(0, 255).to(torch.uint8)


def open_image(split: str, rows: datasets.Dataset, number: int) -> Any:
    """Decodes one image.

    Args:
        split: Name of the split, for errors.
        rows: A data set with the column `image`.
        number: Row.

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


class CropAndFlip:
    """Shifts each image of a batch at random, by a crop of the padded image, and mirrors it.

    Args:
        padding: Black pixels put on every side before the crop.
        flip: Whether to mirror every second image, on average, from left to right.
    """

    def __init__(self, padding: int, flip: bool) -> None:
        self.padding, self.flip = padding, flip

    def __call__(self, images: Tensor) -> Tensor:
        """Changes a batch; torch's generator decides how.

        Args:
            images: `[N, channels, height, width]`.

        Returns:
            The same shape and type.
        """
        count, _, height, width = images.shape
        if self.padding:
            top, left = torch.randint(2 * self.padding + 1, (2, count, 1))
            padded = torch.nn.functional.pad(images, [self.padding] * 4)
            rows = (top + torch.arange(height))[:, :, None]
            columns = (left + torch.arange(width))[:, None, :]
            crops = padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows, columns]
            images = crops.permute(0, 3, 1, 2)
        if self.flip:
            mirrored = torch.rand(count)[:, None, None, None] < 0.5
            images = torch.where(mirrored, images.flip(3), images)
        return images


class ImageRows(torch.utils.data.Dataset):
    """Pixels and labels; in memory if they fit, otherwise decoded when they are asked for.

    Args:
        read: Gives the pixels of a row.
        labels: Class numbers.
        augment: Applied to every batch, or None.
    """

    def __init__(
        self,
        read: ImageReader,
        labels: Sequence[int],
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.read, self.labels, self.augment = read, list(labels), augment
        self.images: Tensor | None = None
        if len(read) * read.channels * read.size[0] * read.size[1] <= IN_MEMORY_BYTES:
            self.images = torch.stack([read(number) for number in range(len(read))])

    def pixels(self, numbers: Sequence[int]) -> Tensor:
        """Gives images as they are, without augmentation.

        Args:
            numbers: Rows.

        Returns:
            uint8 `[rows, channels, height, width]`.
        """
        if self.images is not None:
            return self.images[list(numbers)]
        return torch.stack([self.read(number) for number in numbers])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:  # noqa: PLW3201
        images = self.pixels(numbers)
        if self.augment is not None:
            images = self.augment(images)
        labels = (self.labels[number] for number in numbers)
        return [
            {"pixel_values": image, "labels": label}
            for image, label in zip(images, labels, strict=True)
        ]


class ImageCollator:
    """Puts images into a batch and normalises them.

    Args:
        mean: Of each channel, in 0 to 1.
        deviation: Standard deviation likewise.
    """

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.deviation = torch.tensor(deviation).view(-1, 1, 1)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Makes a batch.

        Args:
            items: Rows of `ImageRows`.

        Returns:
            The model's inputs.
        """
        images = torch.stack([item["pixel_values"] for item in items]).float() / 255
        return {
            "pixel_values": (images - self.mean) / self.deviation,
            "labels": torch.tensor([item["labels"] for item in items]),
        }


def channel_statistics(rows: ImageRows) -> tuple[list[float], list[float]]:
    """Measures mean and standard deviation of every channel, in 0 to 1.

    Args:
        rows: Images; of a large set, `STATISTICS_ROWS` rows are looked at, evenly spread.

    Returns:
        Means and standard deviations. That of a constant channel is given as 1.
    """
    numbers = torch.linspace(0, len(rows) - 1, min(len(rows), STATISTICS_ROWS)).long().tolist()
    total = square = torch.zeros(1, dtype=torch.float64)
    chunks = [numbers[start : start + 500] for start in range(0, len(numbers), 500)]
    for chunk in chunks:
        pixels = rows.pixels(chunk).double().div(255).transpose(0, 1).flatten(1)
        total = total + pixels.mean(1) * len(chunk)
        square = square + pixels.square().mean(1) * len(chunk)
    mean = total / len(numbers)
    deviation = (square / len(numbers) - mean.square()).clamp_min(0).sqrt()
    deviation = torch.where(deviation < 1e-4, 1.0, deviation)
    return mean.tolist(), deviation.tolist()


def load_pixels(
    splits: Mapping[str, datasets.Dataset],
    labels: Mapping[str, Sequence[int]],
    model_args: ModelArguments,
    data_args: DataArguments,
) -> tuple[dict[str, ImageRows], ImageCollator, Any]:
    """Reads the images of all splits, in the size and the scale that the model takes.

    Args:
        splits: Splits with the column `image`.
        labels: Class numbers of each split.
        model_args: Model arguments.
        data_args: Data arguments.

    Returns:
        Images of each split (those of `train` with augmentation), the collator that normalises them
        and the image processor that does the same for others.
    """
    split, rows = next(iter(splits.items()))
    first = open_image(split, rows, 0)
    channels = data_args.num_channels or (1 if first.mode in GREY else 3)
    size = (first.height, first.width)
    if model_args.model_name_or_path:
        processor = resizer = load_processor(model_args)
        _, channels = classes_of(model_args)
        size = tuple(resized(processor, first.convert("L" if channels == 1 else "RGB")).shape[1:])
    else:
        if data_args.image_size:
            size = (data_args.image_size, data_args.image_size)
        processor = new_processor(size)
        resizer = processor if data_args.image_size else None
    augment = None
    if data_args.crop_padding or data_args.flip:
        augment = CropAndFlip(data_args.crop_padding, data_args.flip)
    images = {
        name: ImageRows(
            ImageReader(name, rows, size, channels, resizer),
            labels[name],
            augment if name == "train" else None,
        )
        for name, rows in splits.items()
    }
    if not model_args.model_name_or_path:
        processor.image_mean, processor.image_std = channel_statistics(images[split])
    scales = getattr(processor, "do_normalize", True) and processor.image_mean is not None
    mean, deviation = (
        (processor.image_mean, processor.image_std)
        if scales
        else ([0.0] * channels, [1.0] * channels)
    )
    return images, ImageCollator(mean, deviation), processor
