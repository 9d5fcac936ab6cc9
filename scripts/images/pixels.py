"""Batches of images: memory, random crops and flips, normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from images.data import DataArguments
from images.model import ModelArguments, classes_of, load_processor, new_processor
from images.reading import GREY, ImageReader, open_image, resized

IN_MEMORY_BYTES = 2**31
STATISTICS_ROWS = 10_000


class CropAndFlip:
    """Shift each image of a batch at random, by a crop of the padded image, and mirror some.

    Args:
        padding: Number of black pixels added on every side before the crop.
        flip: Whether to mirror every second image, on average, from left to right.
    """

    def __init__(self, padding: int, flip: bool) -> None:
        self.padding, self.flip = padding, flip

    def __call__(self, images: Tensor) -> Tensor:
        """Change a batch, at random by torch's generator.

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
    """Pixels and labels: in memory if they fit, otherwise decoded when they are used.

    Args:
        read: Function that returns the pixels of a row.
        labels: Class numbers.
        augment: Function applied to every batch, or None.
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
        """Return images without augmentation.

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
    """Collect images into a batch and normalise them.

    Args:
        mean: Mean of each channel, in 0 to 1.
        deviation: Standard deviation of each channel.
    """

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.deviation = torch.tensor(deviation).view(-1, 1, 1)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collect a batch.

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
    """Measure mean and standard deviation of every channel, in 0 to 1.

    Args:
        rows: Images; of a large set, `STATISTICS_ROWS` evenly spread rows count.

    Returns:
        Means and standard deviations; 1 as the deviation of a constant channel.
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
    """Read the images of all splits, in the size and scale of the model.

    Args:
        splits: Splits with the column `image`.
        labels: Class numbers of each split.
        model_args: Model arguments.
        data_args: Data arguments.

    Returns:
        Images of each split (those of `train` with augmentation), the collator that normalises
        them, and the image processor that prepares further images in the same way.
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
