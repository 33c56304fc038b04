"""An encoded image -> a Pillow image. Image files may be hostile: only formats whose readers are in
Pillow itself are tried, and the size is checked before anything is decoded."""

from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from longfire.errors import DataError, SettingsError

if TYPE_CHECKING:
    from PIL.Image import Image

# EPS would start another program; the rarer formats have had most of the faults.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM")
MODES = {3: "RGB", 1: "L"}
# Grey with 16 bits, of which Pillow's own conversion makes white wherever a value is above 255
MODES_OF_16_BITS = ("I;16", "I;16B", "I;16L", "I")
LARGEST_OF_16_BITS = 65_535


def refuse_without_pillow() -> None:
    """Raises SettingsError where Pillow is not installed."""
    if find_spec("PIL") is None:
        raise SettingsError(
            "job.task = 'image_classification' decodes images with Pillow, which is not installed: "
            "pip install 'longfire[images]'"
        )


def decode(
    content: bytes, channels: int, max_pixels: int, where: str, shorter_side: int = 0
) -> "Image":
    """The first frame of an image, in colour or in grey.

    shorter_side: that of the image when it has been resized; 0: it is not resized as a whole.
    where: its place, for messages. Raises DataError for what is no image, is cut off, or has more
    than max_pixels pixels, before or after it is resized.
    """
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    try:
        with pillow.open(BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"{where}: {width} x {height} pixels are more than images.max_pixels = "
                    f"{max_pixels:,}: raise that if the file is to be trusted, or remove it"
                )
            refuse_elongated(width, height, shorter_side, max_pixels, where)
            return with_8_bits(image).convert(MODES[channels])
    except DataError:
        raise
    except UnidentifiedImageError as error:  # whose text is the address of a buffer
        raise DataError(
            f"{where}: not an image of a kind that is read ({', '.join(FORMATS)}); repair or "
            "remove it"
        ) from error
    # Pillow raises errors of many kinds for broken files, and documents no list of them.
    except Exception as error:
        raise DataError(
            f"{where}: no readable image ({', '.join(FORMATS)}): {type(error).__name__}: {error}; "
            "repair or remove it"
        ) from error


def refuse_elongated(
    width: int, height: int, shorter_side: int, max_pixels: int, where: str
) -> None:
    """Raises DataError for an image that is so long that it would have more than max_pixels pixels
    when its shorter side is resized."""
    resized_pixels = shorter_side**2 * max(width, height) // max(1, min(width, height))
    if resized_pixels > max_pixels:
        raise DataError(
            f"{where}: {width} x {height} pixels have {resized_pixels:,} when the shorter side is "
            f"resized to {shorter_side}, more than images.max_pixels = {max_pixels:,}: raise that, "
            "or remove the file"
        )


def with_8_bits(image: "Image") -> "Image":
    """A grey image of 16 bits with 8 bits, rounded to the nearest; any other as it is."""
    from PIL import Image as pillow

    if image.mode not in MODES_OF_16_BITS:
        return image
    values_HW = np.asarray(image).astype(np.float64)
    scaled_HW = np.rint(values_HW * 255 / LARGEST_OF_16_BITS)
    return pillow.fromarray(scaled_HW.clip(0, 255).astype(np.uint8))
