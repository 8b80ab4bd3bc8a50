"""Image files: what is read, against Pillow and plain numpy, and what is refused."""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sfg_fast.data import Case, ImageForm, images, load_images, read_cohort
from sfg_fast.data.images import read_image
from sfg_fast.errors import InputError

from .small_cohort import picture, small_images

FORM = ImageForm((8, 6), False, 3, [100.0, 110.0, 120.0], [10.0, 20.0, 40.0])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_read_to_the_bit(tmp_path, channels):
    Image.fromarray(picture(3, (5, 7), channels)).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert (found.shape, found.dtype) == ((channels, 5, 7), np.uint8)
    expected = picture(3, (5, 7), channels)
    np.testing.assert_array_equal(found, expected[None] if channels == 1 else np.moveaxis(expected, -1, 0))


def test_jpeg_is_read_whatever_its_name_says(tmp_path):
    smooth = np.add.outer(np.arange(16), np.arange(16))[..., None] * np.array([4, 6, 8]) % 256
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "a.png", "JPEG", quality=95)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.moveaxis(np.asarray(image), -1, 0))
    assert np.abs(read_image(tmp_path / "a.png").astype(int) - np.moveaxis(smooth, -1, 0)).mean() < 10


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, np.transpose),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).T),
        (8, np.rot90),
        (99, lambda a: a),
    ],
)
def test_exif_says_where_up_is(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(0, (5, 7), 1)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0], turned(picture(0, (5, 7), 1)))


def test_broken_exif_says_nothing(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.jpg").shape == (3, 8, 6)


def test_resized_images_cover_all_pixels(tmp_path):
    """Shrunk by two, a checkerboard is grey all over; a ramp stays one; enlarged, nothing overshoots."""
    board = (np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)
    ramp = np.repeat(np.arange(32, dtype=np.uint8)[None] * 8, 8, 0)
    for name, array in (("board", board), ("ramp", ramp)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    np.testing.assert_allclose(read_image(tmp_path / "board.png", (8, 8))[0, 1:-1, 1:-1], 127.5, atol=1)
    small = read_image(tmp_path / "ramp.png", (4, 16))[0].astype(int)
    assert small.shape == (4, 16)
    np.testing.assert_allclose(small[:, 1:-1], np.broadcast_to(np.arange(1, 15) * 16 + 4, (4, 14)), atol=1)
    large = read_image(tmp_path / "ramp.png", (9, 70))[0]
    assert large.shape == (9, 70)
    assert (np.diff(large.astype(int), axis=1) >= 0).all()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width=4, height=3, depth=8, colour=2, data=None) -> bytes:
    """By hand, so that it may say anything."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    data = bytes(height * (1 + -(-width * channels * depth // 8))) if data is None else data
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(mode: str, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (4, 3)).save(stream, kind, **options)
    return stream.getvalue()


def noise(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(0, (64, 48))).save(stream, kind)
    return stream.getvalue()


def animated() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (4, 3), (shade, 0, 0)) for shade in (0, 200)]
    frames[0].save(stream, "PNG", save_all=True, append_images=frames[1:])
    return stream.getvalue()


BAD = {
    "nothing": (b"", "not readable as PNG or JPEG"),
    "text": (b"image,age\n", "not readable as PNG or JPEG"),
    "another format": (saved("RGB", "GIF"), "not readable as PNG or JPEG"),
    "a palette": (saved("P"), "mode P, expected 8 bits of grey"),
    "black and white": (saved("1"), "mode 1, expected 8 bits"),
    "transparent": (saved("RGBA"), "mode RGBA, expected .* nothing transparent"),
    "transparent grey": (saved("LA"), "mode LA, expected"),
    "a transparent colour": (saved("RGB", transparency=(0, 0, 0)), "mode RGB with a transparent colour, expected"),
    "ink": (saved("CMYK", "JPEG"), "mode CMYK, expected"),
    "grey of 16 bits": (png(depth=16, colour=0), r"mode I;16.* of 16 bits, expected 8 bits"),
    "colour of 16 bits": (png(depth=16, colour=2), "mode RGB of 16 bits, expected 8 bits"),
    "two pictures": (animated(), "2 pictures in one file, expected one"),
    "more pixels than are taken": (png(9000, 9000, data=b""), "9000 x 9000 pixels, more than the 67108864"),
    "more pixels than fit": (png(1000, 1000, data=b""), "1000 x 1000 pixels, more than a file of .* bytes can hold"),
    "a bomb": (png(10**5, 10**5, data=b""), "pixels"),
    **{
        f"{kind} cut to {share:.0%}": (cut, "not readable as PNG or JPEG")
        for kind in ("PNG", "JPEG")
        for share in (0.1, 0.5, 0.99)
        for whole in [noise(kind)]
        for cut in [whole[: int(share * len(whole))]]
    },
    "a wrong checksum": (saved("RGB")[:30] + b"\0" + saved("RGB")[31:], "not readable as PNG or JPEG"),
    "no pixels": (png(0, 0), "not readable as PNG or JPEG"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_images_are_refused(tmp_path, what):
    content, message = BAD[what]
    (tmp_path / "a.png").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=f"a.png: .*{message}") as error:
            read_image(tmp_path / "a.png")
    assert "\n" not in str(error.value)
    assert "object at" not in str(error.value)


def test_any_damage_is_refused_or_read(tmp_path):
    """Whatever one other byte makes of a file, it is an image or one sentence."""
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG"):
        good = saved("RGB", kind)
        for _ in range(150):
            content = bytearray(good)
            content[rng.integers(len(good))] = rng.integers(256)
            (tmp_path / "a").write_bytes(content[: rng.integers(len(good))] if rng.random() < 0.2 else content)
            with contextlib.suppress(InputError):
                assert read_image(tmp_path / "a").dtype == np.uint8


def test_files_that_are_too_large_are_refused(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(InputError, match=r"a.png: 268435457 bytes, expected at most 268435456"):
        read_image(tmp_path / "a.png")


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.png", tmp_path / ("x" * 5000)):
        with pytest.raises(InputError, match="no such file"):
            read_image(path)


def test_grey_of_fewer_bits_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png(4, 1, depth=4, colour=0, data=b"\0\x0f\x80"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), [[[0, 255, 136, 0]]])


# --- as a network sees them -------------------------------------------------------------------------------------------


def test_images_are_normalised(tmp_path):
    cases = read_cohort(small_images(tmp_path, 3)).cases
    found = load_images(cases, FORM)
    assert (found.shape, found.dtype) == ((3, 3, 8, 6), np.float32)
    for index, image in enumerate(found):
        expected = (picture(index) - np.array(FORM.mean)) / np.array(FORM.sd)
        np.testing.assert_allclose(image, np.moveaxis(expected, -1, 0), atol=1e-5)
    assert load_images((), FORM).shape == (0, 3, 8, 6)


def test_images_are_resized_only_if_those_of_training_were(tmp_path):
    case = read_cohort(small_images(tmp_path, 1, (16, 12))).cases[0]
    with pytest.raises(
        InputError, match=r"case faces_0000.png: .*0000.png: 16 x 12 pixels .*expected 8 x 6 as the oth"
    ):
        load_images([case], FORM)
    resized = ImageForm((8, 6), True, 3, FORM.mean, FORM.sd)
    small = Image.fromarray(picture(0, (16, 12))).resize((6, 8), Image.Resampling.BILINEAR)
    expected = (np.moveaxis(np.asarray(small), -1, 0) - np.array(FORM.mean)[:, None, None]) / np.array(FORM.sd)[
        :, None, None
    ]
    np.testing.assert_allclose(load_images([case], resized)[0], expected, atol=1e-5)


def test_images_of_another_kind_are_refused(tmp_path):
    case = read_cohort(small_images(tmp_path, 1, channels=1)).cases[0]
    with pytest.raises(InputError, match=r"case .*: .*0000.png: an image of grey, expected one of red, green, blue"):
        load_images([case], FORM)
    with pytest.raises(InputError, match=r"^case x: no such file .*none.png"):
        load_images([Case("x", (tmp_path / "none.png",), {}, None, "test")], FORM)


def test_a_form_as_json():
    assert ImageForm.from_json(FORM.to_json()) == FORM
    for change in (
        {"size": [8]},
        {"size": [0, 6]},
        {"size": [2**20, 2**20]},
        {"channels": 2},
        {"mean": [1.0]},
        {"sd": [1.0, 0.0, 1.0]},
        {"sd": [1.0, float("inf"), 1.0]},
    ):
        with pytest.raises(InputError, match=r"images: .* expected size, channels"):
            ImageForm.from_json({**FORM.to_json(), **change})


def test_text_in_a_png_that_unpacks_to_much_is_refused(tmp_path):
    about = PngImagePlugin.PngInfo()
    about.add_text("comment", "x" * 2**22, zip=True)
    Image.fromarray(picture(0)).save(tmp_path / "a.png", pnginfo=about)
    with pytest.raises(InputError, match=r"a.png: not readable as PNG or JPEG"):
        read_image(tmp_path / "a.png")
    assert images.MAX_PIXELS == 2**26


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_large_empty_image_is_read(tmp_path, kind):
    Image.new("RGB", (3000, 3000)).save(tmp_path / "a", kind, quality=1)
    assert read_image(tmp_path / "a").shape == (3, 3000, 3000)
