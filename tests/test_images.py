"""longfire/images/: which image comes when, what is seen of it, and files that are hostile or broken."""

import io
import json
import os
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

from longfire.config.settings import Classification, Data, Images
from longfire.errors import DataError, SettingsError
from longfire.images.augmentation import View, random_box
from longfire.images.batches import ImageBatches
from longfire.images.dataset import read_dataset
from longfire.images.decoding import decode
from longfire.images.sources import ImageFolder

SIZE = 8
SETTINGS = Images(mean=(0.0,), std=(1.0,))


def png(value: int, size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    """A grey image of one value."""
    found = io.BytesIO()
    Image.new("L", size, value).save(found, "PNG")
    return found.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three classes with 6, 5 and 4 images, whose value names class and number: 40 x class + number."""
    for label, count in enumerate((6, 5, 4)):
        (tmp_path / "train" / "abc"[label] / "deeper").mkdir(parents=True)
        for number in range(count):
            place = tmp_path / "train" / "abc"[label]
            if number == 0:
                place = place / "deeper"
            (place / f"{number}.png").write_bytes(png(40 * label + number))
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "a" / ".hidden.png").write_bytes(b"no image")
    return tmp_path / "train"


def batches_of(folder: Path, images: Images = SETTINGS, **data) -> ImageBatches:
    given = Data(
        **{"dataset": (str(folder),), "num_workers": 1, "validation_fraction": 0.0, **data}
    )
    dataset = read_dataset(given, images, Classification())
    return ImageBatches(dataset, given, View(images, SIZE, 1, seed=3), tokens=5)


def values(batch) -> list[int]:
    return (batch.pixels_BCHW[:, 0, 0, 0] * 255).round().int().tolist()


def test_an_epoch_has_each_image_once_with_its_class(folder):
    with batches_of(folder) as batches:
        first, second = batches.at(0, 15), batches.at(15, 15)
    everything = sorted(
        40 * label + n for label, count in enumerate((6, 5, 4)) for n in range(count)
    )
    assert sorted(values(first)) == sorted(values(second)) == everything
    assert values(first) != values(second) != everything, "each epoch has an order of its own"
    assert first.labels_B.tolist() == [value // 40 for value in values(first)]


def test_any_batch_is_the_same_however_it_is_reached(folder):
    """Number i of the run, with crops, flips, mixup and CutMix: in large batches, small ones, from the middle, without prefetching."""
    images = replace(SETTINGS, crop="resized", flip=True, mixup_alpha=0.5, cutmix_alpha=1.0)
    with (
        batches_of(folder, images) as batches,
        batches_of(folder, images, prefetch_factor=0) as bare,
    ):
        whole = batches.at(0, 24)
        pieces = [bare.at(first, 3) for first in range(0, 24, 3)]
        middle = batches.at(7, 5)
    for name in ("pixels_BCHW", "labels_B", "partner_labels_B", "share_B"):
        joined = torch.cat([getattr(piece, name) for piece in pieces])
        assert joined.equal(getattr(whole, name)), name
        assert getattr(middle, name).equal(getattr(whole, name)[7:12]), name


def test_mixup_is_the_weighted_sum_of_two_images_of_the_run(folder):
    with (
        batches_of(folder) as plain,
        batches_of(folder, replace(SETTINGS, mixup_alpha=1.0)) as mixed,
    ):
        true, batch = plain.at(0, 14), mixed.at(0, 14)
    partners = torch.arange(14) ^ 1
    share_B = batch.share_B[:, None, None, None]
    expected = share_B * true.pixels_BCHW + (1 - share_B) * true.pixels_BCHW[partners]
    torch.testing.assert_close(batch.pixels_BCHW, expected)
    assert batch.partner_labels_B.equal(true.labels_B[partners])
    torch.testing.assert_close(batch.share_B + batch.share_B[partners], torch.ones(14))
    assert batch.share_B.unique().numel() > 7


def test_cutmix_has_a_part_of_the_partner_and_its_share_of_the_label(folder):
    """Each image has one value: which pixels are the partner's is seen, and how many."""
    with (
        batches_of(folder) as plain,
        batches_of(folder, replace(SETTINGS, cutmix_alpha=1.0)) as cut,
    ):
        true, batch = plain.at(0, 60), cut.at(0, 60)
    partners = torch.arange(60) ^ 1
    own_BHW, mixed_BHW = true.pixels_BCHW[:, 0], batch.pixels_BCHW[:, 0]
    is_own_BHW = mixed_BHW == own_BHW
    assert (is_own_BHW | (mixed_BHW == own_BHW[partners])).all()
    differs_B = own_BHW[:, 0, 0] != own_BHW[partners][:, 0, 0]
    assert differs_B.sum() > 30 and is_own_BHW[differs_B].equal(is_own_BHW[partners][differs_B])
    shares_B = is_own_BHW.double().mean((1, 2))[differs_B]
    torch.testing.assert_close(batch.share_B[differs_B].double(), shares_B, rtol=0, atol=1e-7)
    assert batch.share_B.unique().numel() > 10
    for is_own_HW in is_own_BHW[differs_B]:
        rows, columns = (~is_own_HW).any(1), (~is_own_HW).any(0)
        assert (~is_own_HW).equal(rows[:, None] & columns)  # one rectangle
    assert batch.partner_labels_B.equal(true.labels_B[partners])
    assert batch.labels_B.equal(true.labels_B)


def test_with_mixup_too_a_pair_is_mixed_in_one_of_both_ways(folder):
    with batches_of(folder, replace(SETTINGS, mixup_alpha=1.0)) as batches:
        mixed = batches.at(0, 200)
    with batches_of(folder, replace(SETTINGS, mixup_alpha=1.0, cutmix_alpha=1.0)) as batches:
        both = batches.at(0, 200)
    is_mixup_B = (mixed.pixels_BCHW == both.pixels_BCHW).all((1, 2, 3))
    assert is_mixup_B.equal(is_mixup_B[torch.arange(200) ^ 1])
    assert 60 < is_mixup_B.sum() < 140
    assert both.share_B[is_mixup_B].equal(mixed.share_B[is_mixup_B])


def test_sources_have_the_shares_that_are_asked_for(folder, tmp_path):
    (tmp_path / "more" / "c").mkdir(parents=True)
    (tmp_path / "more" / "c" / "x.png").write_bytes(png(200))
    both = (str(folder), str(tmp_path / "more"))
    with batches_of(folder, dataset=both, data_probs=(3.0, 1.0)) as batches:
        batch = batches.at(0, 40)
        assert batches.dataset.classes == ("a", "b", "c")
        assert "x.png in epoch" in " ".join(batches.origins(0, 8))
    assert Counter(value == 200 for value in values(batch)) == {False: 30, True: 10}
    assert set(batch.labels_B[torch.tensor(values(batch)) == 200].tolist()) == {2}


def test_validation_has_all_images_in_order_on_any_number_of_processes(folder):
    data = {"validation": (str(folder),)}
    with batches_of(folder, **data) as batches:
        part = batches.dataset.validation[0]
        alone = list(batches.validation(part, 4))
        parts = [list(batches.validation(part, 4, process, 3)) for process in range(3)]
    labels = torch.cat([batch.labels_B for batch in alone])
    assert labels[:15].tolist() == [0] * 6 + [1] * 5 + [2] * 4 and labels[15:].tolist() == [-100]
    assert {len(of_process) for of_process in parts} == {2}, "as many batches on each"
    together = [one.labels_B for step in zip(*parts) for one in step]
    assert torch.cat(together)[torch.cat(together) != -100].equal(labels[:15])


def test_a_share_of_the_images_is_kept_for_validation(folder):
    with batches_of(folder, validation_fraction=0.4) as batches:
        dataset = batches.dataset
    kept, trained = dataset.validation[0], dataset.training[0]
    assert len(kept) + len(trained) == 15 and not set(kept.numbers_N) & set(trained.numbers_N)
    assert 0 < len(kept) < 15


def test_parquet_gives_the_images_of_the_folder(folder, tmp_path):
    rows = []
    for label, name in enumerate("abc"):
        for file in sorted((folder / name).rglob("[0-9]*.png"), key=lambda path: path.as_posix()):
            rows.append({"image": {"bytes": file.read_bytes(), "path": "../x"}, "label": label})
    table = pa.Table.from_pylist(rows)
    names = ["a", "b", "c"]
    info = json.dumps({"info": {"features": {"label": {"names": names}}}})
    table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=4)
    with batches_of(folder) as ours, batches_of(tmp_path / "train.parquet") as theirs:
        assert theirs.dataset.classes == ours.dataset.classes == ("a", "b", "c")
        one, other = ours.at(0, 15), theirs.at(0, 15)
    assert one.pixels_BCHW.equal(other.pixels_BCHW) and one.labels_B.equal(other.labels_B)
    with pytest.raises(DataError, match=r"no column 'picture' \(images.image_field\)"):
        batches_of(tmp_path / "train.parquet", replace(SETTINGS, image_field="picture"))


def test_a_random_part_has_the_share_and_the_ratio_that_are_asked_for():
    chance = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(2000):
        left, top, right, bottom = random_box((300, 200), 0.2, chance)
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 200
        areas.append((right - left) * (bottom - top) / 60_000)
        ratios.append((right - left) / (bottom - top))
    # the largest part of an allowed ratio has 8/9 of this image
    assert 0.2 <= min(areas) < 0.25 and 0.85 < max(areas) <= 8 / 9
    assert min(ratios) >= 3 / 4 - 1e-9 and max(ratios) <= 3 / 2 + 1e-9


def test_flip_mirrors_half_of_the_images():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    plain = View(SETTINGS, SIZE, 1, 0).of_validation(image)
    view = View(replace(SETTINGS, flip=True), SIZE, 1, 0)
    seen = [view.of_training(image, number) for number in range(200)]
    mirrored = sum(np.array_equal(one, plain[:, :, ::-1]) for one in seen)
    assert mirrored + sum(np.array_equal(one, plain) for one in seen) == 200
    assert 70 <= mirrored <= 130  # 100 +- 4 standard deviations


def test_random_crops_of_a_padded_image_reach_its_corners():
    image = Image.fromarray(np.full((8, 8), 255, np.uint8))
    view = View(replace(SETTINGS, crop="random", crop_padding=2), SIZE, 1, 0)
    black = {int((view.of_training(image, number) == 0).sum()) for number in range(300)}
    assert black == {64 - (8 - a) * (8 - b) for a in range(3) for b in range(3)}


def test_colours_become_grey_and_grey_becomes_colours():
    red = io.BytesIO()
    Image.new("RGB", (9, 12), (255, 0, 0)).save(red, "PNG")
    grey = View(SETTINGS, SIZE, 1, 0).of_validation(decode(red.getvalue(), 1, 1000, "x"))
    assert grey.shape == (1, 8, 8) and 0.25 < grey.mean() < 0.35
    colours = View(SETTINGS, SIZE, 3, 0).of_validation(decode(png(51), 3, 1000, "x"))
    assert colours.shape == (3, 8, 8) and np.allclose(colours, 0.2)


def header_of_a_huge_image() -> bytes:
    """A PNG that says it has 60,000 x 60,000 pixels, and has nothing."""
    chunk = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    body = b"IHDR" + chunk
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no image at all", "not an image of a kind that is read"),
        (b"", "not an image of a kind that is read"),
        (png(7, (20, 20))[:-30], "no readable image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a kind"),
        (png(7, (40, 40)), "40 x 40 pixels are more than images.max_pixels = 1,000"),
        (header_of_a_huge_image(), "images/x.png: "),
    ],
)
def test_a_broken_or_hostile_image_is_named(content, message):
    """Pillow itself refuses images of more than 180 million pixels; EPS would start another program."""
    with pytest.raises(DataError) as error:
        decode(content, 3, 1000, "images/x.png")
    assert str(error.value).startswith("images/x.png: ") and message in str(error.value)


def test_a_link_to_a_parquet_file_that_is_not_there_is_an_error(folder, tmp_path):
    image = {"bytes": (folder / "a" / "1.png").read_bytes(), "path": None}
    pq.write_table(pa.Table.from_pylist([{"image": image, "label": 0}]), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").symlink_to("not-fetched")
    with pytest.raises(DataError, match=r"b\.parquet: no readable parquet file"):
        batches_of(tmp_path)


def test_no_link_leads_out_of_the_folder(folder, tmp_path):
    (tmp_path / "secret.png").write_bytes(png(1))
    link = folder / "a" / "9.png"
    link.symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="outside of"):
        batches_of(folder)
    link.unlink()
    link.symlink_to(folder / "a" / "1.png")
    with batches_of(folder) as batches:
        assert len(batches.dataset.training[0]) == 16
    link.unlink()
    os.symlink(tmp_path, folder / "outside")
    with pytest.raises(DataError, match="outside of"):
        batches_of(folder)


def test_a_link_that_is_changed_after_the_start_is_not_followed(folder, tmp_path):
    (tmp_path / "secret.png").write_bytes(png(1))
    with batches_of(folder) as batches:
        for file in folder.rglob("[0-9]*.png"):
            file.unlink()
            file.symlink_to(tmp_path / "secret.png")
        with pytest.raises(DataError, match="outside of"):
            batches.at(0, 4)


@pytest.mark.parametrize("made", ["empty", "splits", "class", "missing", "file"])
def test_a_source_without_classes_is_explained(folder, tmp_path, made):
    place = tmp_path / "other"
    expected: tuple[type[Exception], str] = (DataError, "no folder of a class")
    if made == "splits":
        for split in ("train", "val"):
            (place / split / "a").mkdir(parents=True)
        expected = (DataError, "has folders of splits, train, val")
    elif made == "class":
        (place / "a").mkdir(parents=True)
        expected = (DataError, "no image in the folder of this class")
    elif made == "empty":
        place.mkdir()
    elif made == "file":
        place.write_text("x")
        expected = (SettingsError, "no folder and no parquet file")
    else:
        expected = (SettingsError, "is not there")
    with pytest.raises(expected[0], match=expected[1]):
        batches_of(place)


def test_a_class_that_only_validation_has_is_named(folder, tmp_path):
    (tmp_path / "val" / "d").mkdir(parents=True)
    (tmp_path / "val" / "d" / "1.png").write_bytes(png(1))
    with pytest.raises(DataError, match="the class 'd' is not one of the 3"):
        batches_of(folder, validation=(str(tmp_path / "val"),))


def encoded(image, kind):
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_grey_of_16_bits_keeps_its_values(kind):
    """Pillow's own conversion makes white of every value above 255."""
    values_HW = np.array([[0, 255, 257], [30_000, 65_278, 65_535]], np.uint16)
    content = encoded(Image.fromarray(values_HW), kind)
    expected_HW = np.rint(values_HW / 257)
    assert np.array_equal(np.asarray(decode(content, 1, 1000, "x")), expected_HW)
    colours_HWC = np.asarray(decode(content, 3, 1000, "x"))
    assert np.array_equal(colours_HWC, np.repeat(expected_HW[:, :, None], 3, 2))


def test_an_image_that_resizing_makes_too_large_is_refused():
    content = encoded(Image.new("L", (1, 900)), "PNG")
    assert decode(content, 1, 1000, "x").size == (1, 900)
    with pytest.raises(DataError, match=r"y.png: 1 x 900 pixels have 57,600 .* images.max_pixels"):
        decode(content, 1, 1000, "y.png", shorter_side=8)


def test_a_fifo_among_the_images_is_refused_and_not_waited_for(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "a" / "x.png")
    (tmp_path / "b" / "y.png").write_bytes(png(7))
    source = ImageFolder(tmp_path, "images")
    with pytest.raises(DataError, match=r"x.png: .*it is a FIFO"):
        source.content(0)
