"""Images and how they are augmented, and classes."""

from dataclasses import dataclass
from typing import Literal

from longfire.config.settings.declaration import NATURAL, POSITIVE, SHARE, setting


@dataclass(frozen=True)
class Images:
    """How images become the pixels that a model sees (job.task = image_classification)."""

    image_field: str = setting(
        "image", "of parquet files: the column with the encoded image, or with its `bytes`"
    )
    resize: int = setting(
        0,
        "shorter side of an image, in pixels, before the centre or a random part of it is taken; "
        "0: image_size of the model",
        NATURAL,
    )
    crop: Literal["center", "random", "resized"] = setting(
        "center",
        "which part of an image is trained on: center; random (of image_size, after crop_padding "
        "was added); resized (a random area and aspect ratio, resized to image_size). Validation "
        "takes the centre",
    )
    crop_padding: int = setting(
        0, "random: black pixels that are added on each side first", NATURAL
    )
    min_crop_area: float = setting(
        0.08, "resized: the smallest part of an image's area that is taken", "(0, 1]"
    )
    flip: bool = setting(False, "mirror half of the images that are trained on")
    mixup_alpha: float = setting(
        0.0,
        "train on weighted sums of two images and their labels, the weight drawn from Beta(alpha, "
        "alpha); 0: on single images",
        NATURAL,
    )
    cutmix_alpha: float = setting(
        0.0,
        "train on images with a part of another one in them, and on both labels by their areas, "
        "the share drawn from Beta(alpha, alpha); with mixup_alpha too, half of the pairs are "
        "mixed in one way, half in the other; 0: without",
        NATURAL,
    )
    mean: tuple[float, ...] = setting(
        (0.5,), "mean of pixels in [0, 1] that is subtracted: one number, or one for each channel"
    )
    std: tuple[float, ...] = setting((0.5,), "standard deviation that they are divided by")
    max_pixels: int = setting(
        50_000_000, "an image of more pixels is refused before it is decoded", POSITIVE
    )


@dataclass(frozen=True)
class Classification:
    """Records with a class (job.task = image_classification or sequence_classification)."""

    label_field: str = setting("label", "of jsonl and parquet files: the field with the class")
    label_smoothing: float = setting(0.0, "share of each target that all classes have alike", SHARE)
