"""preprocessor_config.json of transformers <-> our settings of images."""

import logging
from pathlib import Path
from typing import TypedDict

from longfire.config.model_config import ModelConfig
from longfire.config.settings import Images
from longfire.errors import SettingsError
from longfire.own_files import read_json

logger = logging.getLogger(__name__)

PREPROCESSOR = "preprocessor_config.json"
BICUBIC = 3  # as Pillow numbers its filters


class Preprocessor(TypedDict, total=False):
    """What of the file is read here."""

    size: object
    do_center_crop: bool
    do_normalize: bool
    resample: int
    image_mean: list[float]
    image_std: list[float]


def preprocessor_of(config: ModelConfig, images: Images) -> dict[str, object]:
    """preprocessor_config.json: how validation images become pixels, as transformers does it."""
    size = config.image_size
    channels = config.image_channels
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": images.resize or size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": of_each_channel(images.mean, channels),
        "image_std": of_each_channel(images.std, channels),
    }


def of_each_channel(values: tuple[float, ...], channels: int) -> list[float]:
    """One number for each channel."""
    if len(values) == channels:
        return list(values)
    return list(values) * channels


def image_settings_in(folder: Path) -> dict[str, str]:
    """The settings of [images] with which validation sees what the model of this folder was trained
    on, as text. What they cannot express is logged. Raises SettingsError for a damaged file."""
    file = folder / PREPROCESSOR
    if not file.is_file():
        logger.info(f"{folder} has no {PREPROCESSOR}: images are normalised as [images] says")
        return {}
    found = read_json(file, Preprocessor, SettingsError, "restore it from a copy, or remove it")
    size = found.get("size")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    given: dict[str, str] = {}
    if found.get("do_normalize", True):
        for key, values in (("mean", found.get("image_mean")), ("std", found.get("image_std"))):
            if values:
                given[f"images.{key}"] = ",".join(map(str, values))
    else:
        given = {"images.mean": "0", "images.std": "1"}
    if isinstance(shortest, int):
        given["images.resize"] = str(shortest)
    else:
        logger.info(
            f"{file} squeezes an image into its size; here its shorter side is resized and the "
            "centre taken, which differs where an image is no square"
        )
    if found.get("resample", BICUBIC) != BICUBIC:
        logger.info(f"{file}: resample = {found['resample']}; here images are resized bicubically")
    return given
