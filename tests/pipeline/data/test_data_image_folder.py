"""Directory trees of images: what is found, how it is split, decoded and kept."""

import logging
import os

import numpy as np
import pytest
import torch
from bitladder.pipeline.data import DATASETS, DataError
from bitladder.pipeline.data.decode import open_image, pixels_of
from bitladder.pipeline.data.fingerprint import fingerprint
from bitladder.pipeline.data.listing import list_images, list_images_now
from PIL import Image

DIVIDED = {"train/cat": 12, "train/dog": 18, "test/cat": 3, "test/dog": 4}
ONE_TREE = {"cat": 30, "dog": 20}


@pytest.fixture
def load(tmp_path):
    """`load(root, **options)`, with a cache of this test's own."""

    def load(root, **options):
        options = {"cache": tmp_path / "cache", "crop": 0} | options
        return DATASETS["image_folder"].factory(root=root, **options)

    return load


def test_train_and_test_folders_are_kept_apart(load, write_tree):
    root = write_tree(DIVIDED)
    bundle = load(root)
    assert bundle.class_names == ("cat", "dog")
    assert [len(s) for s in (bundle.train, bundle.validation, bundle.test)] == [27, 3, 7]
    files = sorted((root / "test").glob("*/*"))
    expected = np.stack([np.array(Image.open(file)) for file in files])
    assert np.array_equal(bundle.test.images.permute(0, 2, 3, 1).numpy(), expected)
    assert bundle.test.labels.tolist() == [0] * 3 + [1] * 4


@pytest.mark.parametrize("name", ["val", "validation"])
def test_a_validation_folder_is_the_validation_split(load, write_tree, name):
    bundle = load(write_tree(DIVIDED | {f"{name}/cat": 2, f"{name}/dog": 3}))
    assert [len(s) for s in (bundle.train, bundle.validation, bundle.test)] == [30, 5, 7]
    assert bundle.validation.labels.tolist() == [0, 0, 1, 1, 1]


def test_a_tree_of_train_alone_is_split(load, write_tree):
    bundle = load(write_tree({"train/cat": 30, "train/dog": 20}))
    assert [len(s) for s in (bundle.train, bundle.validation, bundle.test)] == [36, 4, 10]


def test_one_tree_is_split_by_the_seed_with_every_class_in_its_share(load, write_tree):
    root = write_tree(ONE_TREE)
    first, again, other = load(root), load(root), load(root, split_seed=1)
    assert torch.bincount(first.test.labels).tolist() == [6, 4]
    assert torch.bincount(first.train.labels).tolist() == [22, 14]
    assert torch.equal(first.test.images, again.test.images)
    assert not torch.equal(first.test.images, other.test.images)


def test_a_class_may_be_called_train(load, write_tree):
    assert load(write_tree({"train": 10, "bus": 10})).class_names == ("bus", "train")


def test_folders_inside_a_class_are_searched_and_other_files_passed_over(load, write_tree):
    root = write_tree(ONE_TREE | {"cat/kittens/black": 5})
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / "._000.png").write_text("what a Mac leaves")
    (root / ".git").mkdir()
    (root / "dog" / "round").symlink_to(root / "dog")
    assert len(list_images(root).paths) == 55
    assert load(root).num_classes == 2


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "bmp", "webp", "tif", "gif", "ppm"])
def test_every_format_is_read(load, write_tree, ending):
    bundle = load(write_tree({"a": 4, "b": 4}, ending=ending), test=2, validation=2)
    assert bundle.train.images.shape == (4, 3, 8, 8)


def test_grey_images_have_one_channel(load, write_tree):
    bundle = load(write_tree(ONE_TREE), channels=1)
    assert (bundle.in_channels, len(bundle.mean)) == (1, 1)
    assert bundle.train.images.shape[1:] == (1, 8, 8)


def test_images_are_scaled_by_the_shorter_side_and_cut_around_the_centre(load, tmp_path):
    pixels = np.zeros((16, 48, 3), dtype=np.uint8)
    pixels[:, 16:32] = 200  # the middle third is bright
    for name in ("a", "b"):
        (tmp_path / "wide" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(pixels).save(tmp_path / "wide" / name / f"{i}.png")
    bundle = load(tmp_path / "wide", image_size=8, test=2, validation=2)
    assert bundle.image_size == 8
    assert (bundle.train.images[:, :, :, 1:-1] == 200).all()


def test_the_orientation_in_exif_is_honoured(tmp_path):
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the top row comes to the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = pixels_of(open_image(str(tmp_path / "turned.png"), 3))
    assert upright.shape == (6, 4, 3)
    assert (upright[:, -1] == 255).all()
    assert (upright[:, :-1] == 0).all()


def test_sixteen_bits_are_brought_to_eight(tmp_path):
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = pixels_of(open_image(str(tmp_path / "deep.png"), 1))
    assert found[:, :, 0].tolist() == [[0, 100], [200, 255]]


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    image = Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).quantize(4)
    image.save(tmp_path / "palette.png", transparency=bytes([255, 0, 0, 0]))
    assert (pixels_of(open_image(str(tmp_path / "palette.png"), 3)) == 9).all()


def test_mean_and_std_are_those_of_the_training_images(load, write_tree):
    bundle = load(write_tree(ONE_TREE))
    values = bundle.train.images.double().numpy() / 255
    assert np.allclose(bundle.mean, values.mean((0, 2, 3)), atol=1e-4)
    assert np.allclose(bundle.std, values.std((0, 2, 3)), atol=1e-4)


# what is wrong with the folder


def test_a_folder_that_does_not_exist_is_named(load, tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist\. Set data\.root"):
        load(tmp_path / "nowhere")


def test_an_archive_is_to_be_unpacked(load, tmp_path):
    (tmp_path / "images.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"is a file, not a folder.*unpack"):
        load(tmp_path / "images.tar")


def test_an_empty_folder_is_refused(load, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        load(tmp_path / "empty")


def test_a_single_class_is_refused(load, write_tree):
    with pytest.raises(DataError, match="only one class, 'cat'"):
        load(write_tree({"cat": 9}))


def test_a_class_without_images_is_named(load, write_tree):
    with pytest.raises(DataError, match="bird holds no images"):
        load(write_tree(ONE_TREE | {"bird": 0}))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"test/bird": 2}, "test/ lacks none and alone has bird"),
        ({"train/bird": 2}, "test/ lacks bird and alone has none"),
    ],
)
def test_parts_that_differ_in_their_classes_are_refused(load, write_tree, more, message):
    with pytest.raises(DataError, match=message):
        load(write_tree(DIVIDED | more))


def test_images_of_several_sizes_need_image_size(load, write_tree):
    root = write_tree(ONE_TREE)
    Image.new("RGB", (9, 8)).save(root / "dog" / "odd.png")
    with pytest.raises(DataError, match=r"(?s)1 of 51 images.*odd\.png: 9 x 8.*data\.image_size"):
        load(root)
    assert load(root, image_size=8).image_size == 8


def test_images_that_are_not_square_need_image_size(load, write_tree):
    root = write_tree(ONE_TREE)
    Image.new("RGB", (9, 8)).save(root / "cat" / "000.png")
    with pytest.raises(DataError, match=r"9 x 8.*data\.image_size"):
        load(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, "channels"),
        ({"image_size": 0}, "image_size"),
        ({"on_error": "ignore"}, "on_error"),
        ({"resized_crop": 1.5, "image_size": 8}, "resized_crop is a share"),
        ({"resized_crop": 0.5}, "resized_crop needs image_size"),
        ({"resized_crop": 0.5, "image_size": 8, "in_memory": True}, "in_memory"),
        ({"crop": 8}, "crop must be from 0 to 7"),
        ({"validation": 1000}, "validation"),
        ({"test": 0}, "test"),
    ],
)
def test_an_option_out_of_range_is_named(load, write_tree, options, message):
    with pytest.raises(ValueError, match=message):
        load(write_tree(ONE_TREE), **options)


# files that cannot be decoded


def damage(root, count: int) -> None:
    """Cuts off the first `count` files of the first class."""
    for path in sorted((root / "cat").glob("*.png"))[:count]:
        path.write_bytes(path.read_bytes()[:60])


def test_all_corrupt_images_are_reported_at_once(load, write_tree):
    root = write_tree(ONE_TREE)
    damage(root, 12)
    with pytest.raises(DataError) as error:
        load(root)
    text = str(error.value)
    assert text.startswith("12 of 50 images cannot be used")
    assert text.count(".png") == 10
    assert "... and 2 more" in text
    assert "data.on_error: skip" in text


def test_corrupt_images_can_be_left_out(load, write_tree, caplog):
    root = write_tree(ONE_TREE)
    damage(root, 5)
    whole = load(root, on_error="skip")
    assert sum(len(s) for s in (whole.train, whole.validation, whole.test)) == 45
    assert "5 of 50 images cannot be used" in caplog.text
    again = load(root, on_error="skip")  # out of the cache
    assert torch.equal(whole.train.images, again.train.images)


def test_a_class_that_loses_all_its_images_is_named(load, write_tree):
    root = write_tree(ONE_TREE)
    damage(root, 30)
    with pytest.raises(DataError, match="no training image is left of cat"):
        load(root, on_error="skip")


# the cache


def cache_file(tmp_path):
    (file,) = (tmp_path / "cache").iterdir()
    return file


def test_images_are_decoded_once(load, write_tree, tmp_path):
    root = write_tree(ONE_TREE)
    first = load(root, image_size=8)
    before = cache_file(tmp_path).stat()
    for path in root.glob("*/*.png"):  # same sizes and times, but nothing to decode any more
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert torch.equal(first.train.images, load(root, image_size=8).train.images)
    assert cache_file(tmp_path).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_torn_cache_is_made_anew(load, write_tree, tmp_path, caplog, keep):
    root = write_tree(ONE_TREE)
    first = load(root)
    whole = cache_file(tmp_path).read_bytes()
    cache_file(tmp_path).write_bytes(whole[:keep])
    assert torch.equal(first.train.images, load(root).train.images)
    assert "decoding the images again" in caplog.text
    assert cache_file(tmp_path).read_bytes() == whole


def test_a_flipped_bit_in_the_cache_is_noticed(load, write_tree, tmp_path, caplog):
    root = write_tree(ONE_TREE)
    first = load(root)
    data = bytearray(cache_file(tmp_path).read_bytes())
    data[-100] ^= 1
    cache_file(tmp_path).write_bytes(data)
    assert torch.equal(first.train.images, load(root).train.images)
    assert "does not match its checksum" in caplog.text


def test_a_cache_that_cannot_be_written_is_done_without(load, write_tree, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    bundle = load(write_tree(ONE_TREE), cache=tmp_path / "file")
    assert len(bundle.test) == 10
    assert "could not be kept" in caplog.text


def test_no_unfinished_file_is_left(load, write_tree, tmp_path):
    load(write_tree(ONE_TREE))
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_progress_is_logged(load, write_tree, caplog, monkeypatch):
    monkeypatch.setattr("bitladder.pipeline.data.decode.SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO):
        load(write_tree(ONE_TREE))
    assert "decoding images: 50 / 50" in caplog.text


# the fingerprint


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, True),
        ({"in_memory": False}, True),
        ({"workers": 3}, True),
        ({"memory_limit": 1}, True),
        ({"channels": 1}, False),
        ({"image_size": 6}, False),
        ({"flip": False}, False),
        ({"validation": 0.2}, False),
        ({"on_error": "skip"}, False),
    ],
)
def test_the_fingerprint_is_the_bundles(load, write_tree, options, same):
    root = write_tree(ONE_TREE)
    plain = {"root": root, "crop": 0}
    assert load(root, **options).fingerprint == fingerprint("image_folder", plain | options)
    assert (fingerprint("image_folder", plain | options) == load(root).fingerprint) == same


def test_the_fingerprint_opens_no_image(write_tree):
    root = write_tree(ONE_TREE)
    damage(root, 30)
    assert len(fingerprint("image_folder", {"root": str(root)})) == 16


@pytest.mark.parametrize("change", ["touch", "grow", "rename", "remove", "add"])
def test_a_file_that_changes_changes_the_fingerprint(write_tree, change):
    root = write_tree(ONE_TREE)
    before = list_images_now(root).content
    path = root / "cat" / "003.png"
    if change == "touch":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif change == "grow":
        stat = path.stat()
        path.write_bytes(path.read_bytes() + b"x")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "rename":
        path.rename(path.with_name("new.png"))
    elif change == "remove":
        path.unlink()
    else:
        (root / "cat" / "more.png").write_bytes(b"x")
    assert list_images_now(root).content != before


def test_a_moved_folder_keeps_its_fingerprint(write_tree, tmp_path):
    root = write_tree(ONE_TREE)
    before = fingerprint("image_folder", {"root": root})
    moved = root.rename(tmp_path / "elsewhere")
    assert fingerprint("image_folder", {"root": moved}) == before


def test_a_folder_that_changes_while_it_is_read_is_not_cached(load, write_tree, tmp_path):
    root = write_tree(ONE_TREE)
    list_images(root)  # as planning does
    (root / "cat" / "late.png").write_bytes((root / "cat" / "000.png").read_bytes())
    with pytest.raises(DataError, match="changed while it was read; start again"):
        load(root)
    assert not (tmp_path / "cache").exists()
    bundle = load(root)
    assert len(bundle.train) + len(bundle.validation) + len(bundle.test) == 51


def test_the_root_must_be_given():
    with pytest.raises(DataError, match="needs the option 'root'"):
        fingerprint("image_folder", {})
