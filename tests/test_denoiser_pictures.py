"""Images of every kind become RGB pixels of one size; what cannot be read is said, by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from safedig.config import UsageError
from safedig.denoiser.pictures import CorruptError, framed, pictures


def read(images):
    return [one.read() for one in pictures(images)]


def test_grey_palette_and_sixteen_bit_images_are_read_as_their_colours(tmp_path):
    grey = np.full((4, 6), 51, np.uint8)
    Image.fromarray(grey).save(tmp_path / "a-grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "b-deep.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "c-palette.png")
    Image.fromarray(np.full((4, 6, 4), (0, 204, 204, 0), np.uint8), "CMYK").convert("RGB").save(tmp_path / "d.png")
    found = read(tmp_path)
    assert [tuple(one.shape) for one in found] == [(3, 4, 6)] * 4
    assert all(torch.allclose(one, torch.full_like(one, 0.2), atol=2e-3) for one in found[:3])
    assert found[3][0].mean() > found[3][1].mean() + 0.5


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_seen_on_white(tmp_path, mode):
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), (0, 0, 0, 255) if mode == "RGBA" else (0, 255))
    image.save(tmp_path / "one.png")
    (pixels,) = read(tmp_path)
    assert pixels[:, 0, 0].tolist() == [1, 1, 1] and pixels[:, 0, 1].tolist() == [0, 0, 0]


def test_a_photograph_is_turned_as_its_exif_data_say(tmp_path):
    image, exif = Image.new("RGB", (8, 4)), Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    image.save(tmp_path / "one.jpg", exif=exif)
    assert read(tmp_path)[0].shape == (3, 8, 4)


def test_a_folder_is_read_in_order_with_the_folders_inside_it_and_nothing_but_images(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.png", "a.jpeg", "b/c.webp"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert [one.name.rsplit("/", 1)[-1] for one in pictures(tmp_path)] == ["a.jpeg", "c.webp", "z.png"]


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n torn"])
def test_a_corrupt_image_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    (one,) = pictures(tmp_path)
    with pytest.raises(CorruptError, match="broken.png' cannot be read as an image"):
        one.read()


def test_a_torn_file_is_corrupt_too(tmp_path):
    path = tmp_path / "one.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(CorruptError):
        read(tmp_path)


def test_tensors_arrays_and_pil_images_of_mixed_sizes_are_understood():
    images = [torch.full((3, 4, 5), 0.5), np.full((1, 2, 2), 255, np.uint8), Image.new("RGB", (7, 3), (255, 0, 0))]
    assert [tuple(one.shape) for one in read(images)] == [(3, 4, 5), (3, 2, 2), (3, 3, 7)]
    assert read(torch.zeros(2, 3, 4, 4))[1].max() == 0 and read(images)[1].min() == 1


def test_equal_images_have_equal_digests_and_others_do_not():
    first, second, third = pictures([torch.zeros(3, 2, 2), torch.zeros(1, 2, 2), torch.zeros(3, 1, 4)])
    assert first.digest == second.digest != third.digest


def test_the_one_column_of_images_of_a_dataset_is_found(tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    Image.new("RGB", (6, 4), (0, 0, 255)).save(tmp_path / "one.png")
    rows = {"name": ["a"], "shot": [str(tmp_path / "one.png")]}
    kinds = Features({"name": Value("string"), "shot": ImageFeature()})
    dataset = Dataset.from_dict(rows, features=kinds)
    assert read(dataset)[0].shape == (3, 4, 6)
    with pytest.raises(UsageError, match="no columns of images .columns: name"):
        list(pictures(dataset.select_columns(["name"])))
    both = dataset.add_column("more", rows["shot"]).cast_column("more", ImageFeature())
    with pytest.raises(UsageError, match="2 columns of images.*select_columns"):
        list(pictures(both))


def test_cropping_keeps_the_aspect_and_the_middle_and_stretching_keeps_everything():
    pixels = torch.zeros(3, 8, 24)
    pixels[:, :, 8:16] = 1
    assert framed(pixels, 4, 4, "crop").min() > 0.9
    whole = framed(pixels, 4, 12, "stretch")
    assert whole[:, :, 5:7].min() > 0.9 and whole[:, :, :3].max() < 0.1
    assert framed(pixels, 4, 4, "stretch")[:, :, 0].max() < 0.5  # control: out of proportion, the edges are there
    assert framed(pixels, 8, 24, "crop") is pixels


@pytest.mark.parametrize("shape", [(1, 1000), (1000, 1), (1, 1), (3, 5)])
def test_any_aspect_comes_out_in_the_frame(shape):
    assert framed(torch.rand(3, *shape), 16, 8, "crop").shape == (3, 16, 8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("nowhere", "'nowhere' is no folder"),
        (7, "A int is no set of images"),
        ([torch.zeros(2, 4, 4)], "image 0 has shape .2, 4, 4.: expected .1, 3 or 4 channels"),
        ([torch.zeros(3, 4, 4), torch.full((3, 4, 4), -1.0)], "image 1 has values from -1 to -1: expected bytes"),
        ([torch.full((3, 4, 4), torch.nan)], "image 0 has values from nan"),
        (["a.png"], "image 0 is a str"),
    ],
)
def test_a_mistake_is_told(images, message):
    with pytest.raises(UsageError, match=message):
        read(images)


def test_an_empty_folder_is_told(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UsageError, match="There is no image in"):
        read(tmp_path)
