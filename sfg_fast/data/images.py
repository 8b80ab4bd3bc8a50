"""Images as files, PNG or JPEG of 8 bits: read with Pillow, checked, resized, and normalised as a network sees them."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from ..errors import InputError
from ..files import one_line
from .cases import Case
from .stored import DEFLATE_LIMIT

if TYPE_CHECKING:
    from PIL import Image, ImageFile

FORMATS = ("PNG", "JPEG")
MAX_PIXELS = 2**26  # 8192 x 8192; refused from the header alone, before any memory is taken
MAX_BYTES = 2**28  # of a file
# No file holds more: deflate packs 1032 bytes of 4 pixels (of 2 bits) into one, and a JPEG has a bit for 64 pixels.
PIXELS_PER_BYTE = 4 * DEFLATE_LIMIT
CHANNELS = {"L": 1, "RGB": 3}  # of the modes of Pillow that are read
CHANNEL_NAMES = {1: ("grey",), 3: ("red", "green", "blue")}
EXPECTED = "expected 8 bits of grey (mode L) or colour (RGB), nothing transparent"
_ORIENTATION = 0x0112  # of EXIF


class ImageFormAsJson(TypedDict):
    """An `ImageForm` as a checkpoint holds it."""

    size: list[int]
    resized: bool
    channels: int
    mean: list[float]
    sd: list[float]


@dataclass(frozen=True)
class ImageForm:
    """What all images of a cohort are: size (height, width), whether each was resized to it, channels (1: grey, 3: red,
    green, blue), and mean and SD of each channel over the training images, in 0 .. 255."""

    size: tuple[int, int]
    resized: bool
    channels: int
    mean: list[float]
    sd: list[float]

    def to_json(self) -> ImageFormAsJson:
        found: Any = asdict(self) | {"size": list(self.size)}
        return found

    @classmethod
    def from_json(cls, content: ImageFormAsJson) -> ImageForm:
        """What `to_json` gave (its shape was checked). InputError for what can't be."""
        size, channels, mean, sd = content["size"], content["channels"], content["mean"], content["sd"]
        good = (
            len(size) == 2
            and 1 <= min(size) <= math.prod(size) <= MAX_PIXELS
            and channels in CHANNEL_NAMES
            and len(mean) == len(sd) == channels
            and all(map(math.isfinite, [*mean, *sd]))
            and min(sd) > 0
        )
        if not good:
            raise InputError(f"images: {content!r}, expected size, channels, and mean and SD of each channel")
        return cls((size[0], size[1]), content["resized"], channels, list(mean), list(sd))

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [N, C, H, W] -> float32: minus the mean, by the SD, per channel."""
        mean, sd = (np.array(one, np.float32)[:, None, None] for one in (self.mean, self.sd))
        return (pixels - mean) / sd


def load_images(cases: Sequence[Case], form: ImageForm) -> np.ndarray:
    """The images of cases as a network sees them, float32 [N, C, H, W]: read, resized if the form says so, normalised.

    InputError, naming case and file, for whatever `read_image` refuses, or another size or mode than the form's.
    """
    pixels = np.empty((len(cases), form.channels, *form.size), np.uint8)
    for case, out in zip(cases, pixels, strict=True):
        out[:] = load_image(case, form.size, form.channels, form.resized)
    return form.normalised(pixels)


def load_image(case: Case, size: tuple[int, int], channels: int, resize: bool) -> np.ndarray:
    """The image of a case, uint8 [C, H, W]. InputError, naming case and file: see `load_images`."""
    try:
        path, found = case.inputs[0], read_image(case.inputs[0], size if resize else None)
        if found.shape[1:] != size:
            height, width = found.shape[1:]
            said = f"{path}: {height} x {width} pixels (height x width), expected {size[0]} x {size[1]} as the others"
            raise InputError(f"{said}; preprocess --size resizes images")
        if found.shape[0] != channels:
            names = [", ".join(CHANNEL_NAMES[count]) for count in (found.shape[0], channels)]
            raise InputError(f"{path}: an image of {names[0]}, expected one of {names[1]}")
    except InputError as error:
        raise InputError(f"case {case.name}: {error}") from error
    return found


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image as uint8 [C, H, W], C = 1 (grey) or 3 (red, green, blue), turned as its EXIF says; resized to size
    (height, width): bilinear, as far as it shrinks over all pixels that it covers.

    InputError: no such file, not a whole PNG or JPEG of one picture, more than MAX_PIXELS or than the file can hold, or
    another mode than 8 bits of grey or colour, such as one with transparency or a palette, which could be read in
    several ways.
    """
    from PIL import Image, UnidentifiedImageError

    if not os.path.isfile(path):  # unlike Path.is_file it never raises
        raise InputError(f"no such file {path}")
    if (size_of_file := os.path.getsize(path)) > MAX_BYTES:
        raise InputError(f"{path}: {size_of_file} bytes, expected at most {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF, and of sizes, which are checked here
            # (A file would be asked for as many bytes as it says that it has; these are no more than there are.)
            with Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS) as image:
                _check(path, image, size_of_file)
                image.load()
                turned = _turned(image)
        if size is not None:
            turned = turned.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        array = np.asarray(turned)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not readable as PNG or JPEG") from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise InputError(f"{path}: not readable as PNG or JPEG ({one_line(error)})") from error
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _check(path: Path, image: ImageFile.ImageFile, size_of_file: int) -> None:
    """InputError for what isn't read, from the header alone."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{path}: {height} x {width} pixels, more than the {MAX_PIXELS} that are accepted")
    if width * height > PIXELS_PER_BYTE * size_of_file:
        raise InputError(f"{path}: {height} x {width} pixels, more than a file of {size_of_file} bytes can hold")
    mode = image.mode
    if any(";16" in str(tile[3]) for tile in image.tile):  # Pillow would drop the lower half of each value
        mode += " of 16 bits"
    elif "transparency" in image.info:
        mode += " with a transparent colour"
    if mode not in CHANNELS:
        raise InputError(f"{path}: an image of mode {mode}, {EXPECTED}")
    if (count := getattr(image, "n_frames", 1)) > 1:
        raise InputError(f"{path}: {count} pictures in one file, expected one")


def _turned(image: Image.Image) -> Image.Image:
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF is an appendix: what can't be read in it says nothing
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image
