"""An encoded image -> a Pillow image. Image files may be hostile: only formats whose readers are in
Pillow itself are tried, and the size is checked before anything is decoded."""

from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING

from longfire.errors import DataError, SettingsError

if TYPE_CHECKING:
    from PIL.Image import Image

# EPS would start another program; the rarer formats have had most of the faults.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM")
MODES = {3: "RGB", 1: "L"}


def refuse_without_pillow() -> None:
    """Raises SettingsError where Pillow is not installed."""
    if find_spec("PIL") is None:
        raise SettingsError(
            "job.task = 'image_classification' decodes images with Pillow, which is not installed: "
            "pip install 'longfire[images]'"
        )


def decode(content: bytes, channels: int, max_pixels: int, where: str) -> "Image":
    """The first frame of an image, in colour or in grey.

    where: its place, for messages. Raises DataError for what is no image, is cut off, or has more
    than max_pixels pixels.
    """
    from PIL import Image as pillow

    try:
        with pillow.open(BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(
                    f"{where}: {width} x {height} pixels are more than images.max_pixels = "
                    f"{max_pixels:,}: raise that if the file is to be trusted, or remove it"
                )
            return image.convert(MODES[channels])
    except DataError:
        raise
    # Pillow raises errors of many kinds for broken files, and documents no list of them.
    except Exception as error:
        raise DataError(
            f"{where}: no readable image ({', '.join(FORMATS)}): {type(error).__name__}: {error}; "
            "repair or remove it"
        ) from error
