"""Convolutional models for images `(C, H, W)`."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from fedtrain.data.base import DataSpec
from fedtrain.errors import TaskError
from fedtrain.tasks.checks import needs_images, positive_int
from fedtrain.tasks.dropout import chance, dropout_layer
from fedtrain.tasks.objectives import Classification, num_outputs

__all__ = ["Cnn", "Resnet18Gn", "SimpleCnn"]


class Cnn(Classification):
    """McMahan's CNN: two 5x5 convolutions that keep the size, each halved by pooling, and 512 hidden units.

    Args:
        spec: images of at least 4 x 4 pixels with a class to predict.
        dropout: chance that training leaves out one of the 512 hidden units.

    References:
        McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017.
    """

    channels_last = True

    def __init__(self, spec: DataSpec, dropout: float = 0.0) -> None:
        needs_images("cnn", spec, least=4)
        self.spec = spec
        self.dropout = chance(dropout)

    def model(self) -> nn.Module:
        """1,663,370 parameters for 1x28x28 and 10 classes; `(B, classes)` logits, or `(B, 1)` for two."""
        channels, height, width = self.spec.input_shape
        return nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(channels, 32, 5, padding=2),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(32, 64, 5, padding=2),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(64 * (height // 4) * (width // 4), 512),
                relu3=nn.ReLU(),
                **dropout_layer("dropout", self.dropout),
                fc2=nn.Linear(512, num_outputs(self.spec)),
            )
        )


class SimpleCnn(Classification):
    """NIID-Bench's simple CNN: two unpadded 5x5 convolutions with pooling, and 120 and 84 hidden units.

    Args:
        spec: images of at least 16 x 16 pixels with a class to predict.
        dropout: chance that training leaves out one of the 120 and 84 hidden units.

    References:
        Li et al., Federated Learning on Non-IID Data Silos: An Experimental Study, ICDE 2022.
    """

    channels_last = True

    def __init__(self, spec: DataSpec, dropout: float = 0.0) -> None:
        needs_images("simple-cnn", spec, least=16)
        self.spec = spec
        self.dropout = chance(dropout)

    def model(self) -> nn.Module:
        """44,426 parameters for 1x28x28 and 10 classes; `(B, classes)` logits, or `(B, 1)` for two."""
        channels, height, width = self.spec.input_shape
        # Unpadded, a 5x5 convolution takes 4 pixels off each side's length; then pooling halves it.
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
        return nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(channels, 6, 5),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(6, 16, 5),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(16 * rows * columns, 120),
                relu3=nn.ReLU(),
                **dropout_layer("dropout1", self.dropout),
                fc2=nn.Linear(120, 84),
                relu4=nn.ReLU(),
                **dropout_layer("dropout2", self.dropout),
                fc3=nn.Linear(84, num_outputs(self.spec)),
            )
        )


class Resnet18Gn(Classification):
    """ResNet-18 for small images: a 3x3 first convolution without pooling, and group instead of batch normalisation.

    Args:
        spec: images with a class to predict; made for 32 x 32.
        groups: groups of each normalisation; a divisor of 64.

    References:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
        Hsieh et al., The Non-IID Data Quagmire of Decentralized Machine Learning, ICML 2020 (group normalisation).
        Reddi et al., Adaptive Federated Optimization, ICLR 2021 (two groups).
    """

    channels_last = True

    def __init__(self, spec: DataSpec, groups: int = 2) -> None:
        needs_images("resnet18-gn", spec)
        self.spec = spec
        self.groups = positive_int("groups", groups)
        if 64 % self.groups:
            raise TaskError("the task option 'groups' is wrong", got=groups, expected="1, 2, 4, 8, 16, 32 or 64")

    def model(self) -> nn.Module:
        """11,173,962 parameters for 3x32x32 and 10 classes; `(B, classes)` logits, or `(B, 1)` for two."""
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(self.spec.input_shape[0], 64, 3, padding=1, bias=False),
            norm=nn.GroupNorm(self.groups, 64),
            relu=nn.ReLU(),
        )
        before = 64
        for stage, channels in enumerate((64, 128, 256, 512), start=1):
            for block in (1, 2):
                stride = 2 if stage > 1 and block == 1 else 1
                layers[f"block{stage}_{block}"] = _Residual(before, channels, stride, self.groups)
                before = channels
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(before, num_outputs(self.spec))
        return nn.Sequential(layers)


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm=nn.GroupNorm(groups, channels)
                )
            )

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(images)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(images))
