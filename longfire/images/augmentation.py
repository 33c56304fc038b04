"""A Pillow image -> the pixels that a model sees. What is drawn depends on the seed and on the
number of the image in the run alone: the same in any process, and after a resume."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longfire.config.settings import Images
from longfire.data.order import AUGMENTATION, CUTMIX, MIXUP, key

if TYPE_CHECKING:
    from PIL.Image import Image

TRIES = 10  # of an area and an aspect ratio that fit into the image
ASPECT_RATIOS = (3 / 4, 4 / 3)
Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels
Part = tuple[slice, slice]  # rows and columns of an image


@dataclass(frozen=True)
class View:
    """What of an image is seen: image_size x image_size pixels, channels x height x width."""

    settings: Images
    image_size: int
    channels: int
    seed: int

    def of_training(self, image: "Image", number: int) -> np.ndarray:
        """Image `number` of the run, float32 (C, H, W)."""
        if self.settings.crop == "center" and not self.settings.flip:
            return self.of_validation(image)
        chance = self.chance(AUGMENTATION, number)
        if self.settings.crop == "resized":
            pixels_HWC = self.resized_part(image, chance)
        elif self.settings.crop == "random":
            pixels_HWC = self.random_part(image, chance)
        else:
            pixels_HWC = self.centre(image)
        if self.settings.flip and chance.random() < 0.5:
            pixels_HWC = pixels_HWC[:, ::-1]
        return self.normalised(pixels_HWC)

    def of_validation(self, image: "Image") -> np.ndarray:
        """The centre, float32 (C, H, W)."""
        return self.normalised(self.centre(image))

    def chance(self, purpose: int, number: int) -> np.random.Generator:
        """The random numbers of an image for a purpose."""
        return np.random.Generator(np.random.Philox(key=int(key(self.seed, purpose, number)[0])))

    @property
    def shorter_side(self) -> int:
        """That of a whole image after it was resized."""
        return self.settings.resize or self.image_size

    @property
    def mixes(self) -> bool:
        """Whether image `number` is trained on together with its partner, image `number ^ 1`."""
        return self.settings.mixup_alpha > 0 or self.settings.cutmix_alpha > 0

    def mixup_share(self, number: int) -> float:
        """The share of image `number` in the sum with its partner, which has the rest: both are of
        one draw (Zhang 2018, "mixup"). 1 without mixup."""
        alpha = self.settings.mixup_alpha
        if not alpha:
            return 1.0
        share = float(self.chance(MIXUP, number // 2).beta(alpha, alpha))
        return 1 - share if number % 2 else share

    def cut_part(self, number: int) -> Part | None:
        """The part of image `number` that shows its partner there instead; None where the two are
        not cut. Both are cut in the same place (Yun 2019, "CutMix", algorithm 1)."""
        alpha = self.settings.cutmix_alpha
        if not alpha:
            return None
        chance = self.chance(CUTMIX, number // 2)
        if self.settings.mixup_alpha and chance.random() < 0.5:
            return None
        side = round(self.image_size * math.sqrt(1 - chance.beta(alpha, alpha)))
        row, column = chance.integers(self.image_size, size=2).tolist()
        return self.around(row, side), self.around(column, side)

    def around(self, middle: int, side: int) -> slice:
        """The rows or columns of a part with this middle, as far as they are in the image."""
        first = middle - side // 2
        return slice(max(first, 0), min(first + side, self.image_size))

    def centre(self, image: "Image") -> np.ndarray:
        """Resized so that the shorter side is `images.resize`, then the middle; uint8 (H, W, C)."""
        whole_HWC = self.shorter_side_resized(image)
        height, width = whole_HWC.shape[:2]
        top = (height - self.image_size) // 2
        left = (width - self.image_size) // 2
        return whole_HWC[top : top + self.image_size, left : left + self.image_size]

    def random_part(self, image: "Image", chance: np.random.Generator) -> np.ndarray:
        """Resized, padded with black, then any part; uint8 (H, W, C)."""
        padding = self.settings.crop_padding
        whole_HWC = np.pad(
            self.shorter_side_resized(image), ((padding,) * 2, (padding,) * 2, (0, 0))
        )
        height, width = whole_HWC.shape[:2]
        top = int(chance.integers(height - self.image_size + 1))
        left = int(chance.integers(width - self.image_size + 1))
        return whole_HWC[top : top + self.image_size, left : left + self.image_size]

    def resized_part(self, image: "Image", chance: np.random.Generator) -> np.ndarray:
        """A part of a random area and aspect ratio, resized (Szegedy 2015); uint8 (H, W, C)."""
        box = random_box(image.size, self.settings.min_crop_area, chance)
        return self.resized(image, self.image_size, self.image_size, box)

    def shorter_side_resized(self, image: "Image") -> np.ndarray:
        """The whole image, uint8 (H, W, C)."""
        width, height = (self.shorter_side * side // min(image.size) for side in image.size)
        return self.resized(image, width, height, None)

    def resized(self, image: "Image", width: int, height: int, box: Box | None) -> np.ndarray:
        """A part of an image (None: all of it), bicubic; uint8 (H, W, C)."""
        from PIL.Image import Resampling

        if box is not None or image.size != (width, height):
            image = image.resize((width, height), Resampling.BICUBIC, box)
        return np.asarray(image).reshape(height, width, self.channels)

    def normalised(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """(pixels / 255 - mean) / std, float32 (C, H, W)."""
        mean_C = np.array(self.settings.mean, np.float32)
        std_C = np.array(self.settings.std, np.float32)
        values_HWC = (pixels_HWC.astype(np.float32) / 255 - mean_C) / std_C
        return np.ascontiguousarray(values_HWC.transpose(2, 0, 1))


def random_box(size: tuple[int, int], min_area: float, chance: np.random.Generator) -> Box:
    """Part of an image of this width and height: its share of the area uniform from min_area to 1,
    the logarithm of its aspect ratio uniform. Where no try fits, the largest centre of an allowed
    ratio."""
    width, height = size
    low, high = map(math.log, ASPECT_RATIOS)
    for _ in range(TRIES):
        area = chance.uniform(min_area, 1) * width * height
        ratio = math.exp(chance.uniform(low, high))
        box_width = math.sqrt(area * ratio)
        box_height = math.sqrt(area / ratio)
        if box_width <= width and box_height <= height:
            left = chance.uniform(0, width - box_width)
            top = chance.uniform(0, height - box_height)
            return left, top, left + box_width, top + box_height
    box_width = min(width, height * ASPECT_RATIOS[1])
    box_height = min(height, width / ASPECT_RATIOS[0])
    left = (width - box_width) / 2
    top = (height - box_height) / 2
    return left, top, left + box_width, top + box_height
