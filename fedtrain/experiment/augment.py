"""Random changes of the training inputs: the kinds of `[training] augment`.

They work on inputs as the model gets them: pixels divided by 255 and scaled, features filled and scaled. None knows
what is black: brightness is added, contrast is about an image's own mean, and what a crop or a rotation uncovers is
mirrored from the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from fedtrain.experiment.base import Section

if TYPE_CHECKING:
    from fedtrain.experiment.sections import Experiment

__all__ = [
    "AugmentationSection",
    "ColourAugmentation",
    "CropAugmentation",
    "CutmixAugmentation",
    "EraseAugmentation",
    "FlipAugmentation",
    "MaskAugmentation",
    "MixupAugmentation",
    "NoiseAugmentation",
    "ReplaceAugmentation",
    "RotateAugmentation",
    "objections",
    "unsuited",
]

_Share = Annotated[float, Field(gt=0, le=1)]


class _Augmentation(Section):
    suits: ClassVar[str] = "images"  # what it can change
    mixes: ClassVar[bool] = False  # whether examples of a batch meet

    name: str  # declared here so that it is the first key of every kind


class FlipAugmentation(_Augmentation):
    """Mirrors images."""

    name: Literal["flip"]
    axis: Literal["horizontal", "vertical"] = "horizontal"
    """horizontal swaps left and right, vertical top and bottom."""
    probability: _Share = 0.5
    """Of each example."""


class CropAugmentation(_Augmentation):
    """Shifts images by whole pixels, each way at random; what is uncovered is mirrored from the image."""

    name: Literal["crop"]
    padding: int = Field(default=4, ge=1)
    """Largest shift in pixels, in height and width; below both."""


class RotateAugmentation(_Augmentation):
    """Rotates images about their centre; pixels are interpolated, corners are mirrored from the image."""

    name: Literal["rotate"]
    degrees: float = Field(default=15.0, gt=0, le=180)
    """Largest angle, to either side."""


class ColourAugmentation(_Augmentation):
    """Changes brightness, contrast and, of three channels, saturation."""

    name: Literal["colour"]
    brightness: float = Field(default=0.2, ge=0)
    """Largest number added to all pixels or taken from them, in the unit of the scaled pixels."""
    contrast: float = Field(default=0.2, ge=0, le=1)
    """Largest change of the factor of a pixel's distance from the image's mean; the factor is 1 without a change."""
    saturation: float = Field(default=0.0, ge=0, le=1)
    """Largest change of the factor of a pixel's distance from its grey; for images of three channels."""


class NoiseAugmentation(_Augmentation):
    """Adds Gaussian noise to each number: for images, features and series."""

    suits: ClassVar[str] = "numbers"

    name: Literal["noise"]
    std: float = Field(default=0.1, gt=0)
    """Standard deviation, in the unit of the scaled inputs."""


class EraseAugmentation(_Augmentation):
    """Sets a random rectangle to 0, which is the mean of scaled pixels (random erasing, Zhong et al. 2020)."""

    name: Literal["erase"]
    probability: _Share = 0.5
    """Of each example."""
    area: _Share = 0.3
    """Largest share of the image; the least is 0.02 or this, the sides' ratio is from 0.3 to 1 / 0.3."""


class MaskAugmentation(_Augmentation):
    """Sets random features to 0, which is the mean of scaled features: for tables and series."""

    suits: ClassVar[str] = "features"

    name: Literal["mask"]
    share: _Share = 0.1
    """Chance of each feature."""


class ReplaceAugmentation(_Augmentation):
    """Replaces random tokens of a text by others of the same text (unigram noising, Xie et al. 2017)."""

    suits: ClassVar[str] = "tokens"

    name: Literal["replace"]
    share: _Share = 0.1
    """Chance of each token."""


class MixupAugmentation(_Augmentation):
    """Mixes each example, and its loss, with another of its batch (Zhang et al. 2018)."""

    suits: ClassVar[str] = "numbers"
    mixes: ClassVar[bool] = True

    name: Literal["mixup"]
    alpha: float = Field(default=0.2, gt=0)
    """An example's own share is drawn from Beta(alpha, alpha)."""


class CutmixAugmentation(_Augmentation):
    """Pastes a rectangle of another example of the batch; the loss is mixed by area (Yun et al. 2019)."""

    mixes: ClassVar[bool] = True

    name: Literal["cutmix"]
    alpha: float = Field(default=1.0, gt=0)
    """The share that stays is drawn from Beta(alpha, alpha)."""


def _by_name(value: Any) -> Any:
    """Read "flip" as { name = "flip" }."""
    return {"name": value} if isinstance(value, str) else value


AugmentationSection = Annotated[
    FlipAugmentation
    | CropAugmentation
    | RotateAugmentation
    | ColourAugmentation
    | NoiseAugmentation
    | EraseAugmentation
    | MaskAugmentation
    | ReplaceAugmentation
    | MixupAugmentation
    | CutmixAugmentation,
    Field(discriminator="name"),
    BeforeValidator(_by_name),
]


def objections(experiment: Experiment) -> Iterator[str]:
    """Say what of an experiment's augmentation does not go together, whatever the data are."""
    augment, privacy = experiment.training.augment, experiment.privacy
    mixing = [section.name for section in augment if section.mixes]
    if mixing and (len(mixing) > 1 or not augment[-1].mixes):
        yield 'training.augment takes one of "mixup" and "cutmix", as its last: it mixes the examples as they then are'
    if mixing and experiment.training.balance == "weight":
        yield (
            f'training.augment = "{mixing[0]}" gives an example two classes, and training.balance = "weight" weighs it '
            'by one; take "oversample"'
        )
    if privacy is None or privacy.unit != "sample":
        return
    if mixing:
        yield (
            f'training.augment = "{mixing[0]}" mixes examples; privacy.unit = "sample" bounds the gradient of each '
            "by itself"
        )
    if privacy.augmentations > 1 and not augment:
        yield f"privacy.augmentations = {privacy.augmentations} needs training.augment, or all copies are the same"


def unsuited(augment: Sequence[AugmentationSection], shape: Sequence[int], tokens: bool) -> str:
    """Say why an augmentation cannot change the data's inputs; "" if all can.

    Args:
        augment: the augmentations.
        shape: of one input; three numbers are an image's channels, height and width.
        tokens: whether inputs are tokens.
    """
    kind = "tokens" if tokens else "images" if len(shape) == 3 else "features"
    for section in augment:
        field = f'training.augment = "{section.name}"'
        if section.suits != kind and not (section.suits == "numbers" and not tokens):
            return f"{field} is for {section.suits}, and the data's inputs are {kind}"
        if isinstance(section, CropAugmentation) and section.padding >= min(shape[1:]):
            return f"{field} has padding = {section.padding}, and the images are {shape[1]} x {shape[2]} pixels"
        if isinstance(section, ColourAugmentation) and section.saturation and shape[0] != 3:
            return (
                f"{field} has saturation = {section.saturation:g}, which needs 3 channels, and images have {shape[0]}"
            )
    return ""
