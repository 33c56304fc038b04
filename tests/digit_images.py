"""Images of digits for tests: drawn with the font that comes with Pillow, moved, turned and noisy, so that no data set is needed."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 16


def digit(number: int, chance: np.random.Generator) -> Image.Image:
    """One digit on SIZE x SIZE grey pixels."""
    image = Image.new("L", (SIZE, SIZE))
    font = ImageFont.load_default(size=float(chance.uniform(13, 15)))
    left, top = chance.uniform(3, 5), chance.uniform(-1, 1)
    ImageDraw.Draw(image).text((left, top), str(number), fill=255, font=font)
    image = image.rotate(float(chance.uniform(-8, 8)), Image.Resampling.BILINEAR)
    noisy = np.asarray(image) + chance.normal(0, 10, (SIZE, SIZE))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_digits(root: Path, each: int, seed: int) -> Path:
    """root/<digit>/<number>.png, `each` of every digit."""
    chance = np.random.default_rng(seed)
    for number in range(10):
        (root / str(number)).mkdir(parents=True)
        for i in range(each):
            digit(number, chance).save(root / str(number) / f"{i:04}.png")
    return root
