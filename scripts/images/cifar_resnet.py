"""ResNet for small images. Each saved model contains a copy of this file."""

from __future__ import annotations

from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification


class CifarResNetConfig(ResNetConfig):
    """Configuration of `CifarResNetForImageClassification`; that of transformers' ResNet."""

    model_type = "cifar_resnet"


class CifarResNetForImageClassification(ResNetForImageClassification):
    """transformers' ResNet whose stem is a 3x3 convolution of stride 1, without pooling.

    Args:
        config: Its shape.
    """

    config_class = CifarResNetConfig
    # The loss is the mean over the batch; the Trainer reads this before it scales the loss.
    accepts_loss_kwargs = False

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(
            config.num_channels, config.embedding_size, kernel_size=3, padding=1, bias=False
        )
        stem.pooler = nn.Identity()
        self.post_init()
