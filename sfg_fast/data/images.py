"""Images in PNG or JPEG files of 8 bits: this module reads them with Pillow, checks, resizes and normalises them."""

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
MAX_BYTES = 2**28  # the largest file that is read
# No file holds more: deflate packs 1032 bytes of 4 pixels (of 2 bits) into one, and a JPEG has a bit for 64 pixels.
PIXELS_PER_BYTE = 4 * DEFLATE_LIMIT
CHANNELS = {"L": 1, "RGB": 3}  # how many channels each of Pillow's modes has that are read
CHANNEL_NAMES = {1: ("grey",), 3: ("red", "green", "blue")}
EXPECTED = "expected 8 bits of grey (mode L) or colour (RGB), nothing transparent"
_ORIENTATION = 0x0112  # EXIF's number for the orientation


class ImageFormAsJson(TypedDict):
    """An `ImageForm` as a checkpoint holds it."""

    size: list[int]
    resized: bool
    channels: int
    mean: list[float]
    sd: list[float]


@dataclass(frozen=True)
class ImageForm:
    """What all images of a cohort are: their size (height, width), whether each was resized to that size, their
    channels (1: grey, 3: red, green, blue), and mean and SD of each channel over the training images, in 0 .. 255."""

    size: tuple[int, int]
    resized: bool
    channels: int
    mean: list[float]
    sd: list[float]

    def to_json(self) -> ImageFormAsJson:
        """The form as an object that JSON can hold, for `from_json`."""
        found: Any = asdict(self) | {"size": list(self.size)}
        return found

    @classmethod
    def from_json(cls, content: ImageFormAsJson) -> ImageForm:
        """The form that `to_json` described; the types in `content` must have been checked. Raises InputError for
        values that no form can have."""
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
        """Pixels uint8 [N, C, H, W] as a network sees them, float32: each channel minus its mean, divided by its SD."""
        mean, sd = (np.array(one, np.float32)[:, None, None] for one in (self.mean, self.sd))
        return (pixels - mean) / sd


def load_images(cases: Sequence[Case], form: ImageForm) -> np.ndarray:
    """Reads the images of cases, resizes them if the form says so, and normalises them: float32 [N, C, H, W].

    Raises InputError, naming case and file, for whatever `read_image` refuses, and for another size or other channels
    than the form's.
    """
    pixels = np.empty((len(cases), form.channels, *form.size), np.uint8)
    for case, out in zip(cases, pixels, strict=True):
        out[:] = load_image(case, form.size, form.channels, form.resized)
    return form.normalised(pixels)


def load_image(case: Case, size: tuple[int, int], channels: int, resize: bool) -> np.ndarray:
    """The image of a case, uint8 [C, H, W], resized to `size` if `resize`. Raises InputError, naming case and file, for
    whatever `read_image` refuses, and for another size or other channels."""
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
    """Reads an image as uint8 [C, H, W], C = 1 (grey) or 3 (red, green, blue), turned as its EXIF says.

    size: (height, width) that the image is resized to, by bilinear interpolation; where the image shrinks, each new
    pixel is made of all pixels that it covers.
    Raises InputError if there is no such file, if it isn't a whole PNG or JPEG of one picture, if it has more pixels
    than MAX_PIXELS or than the file can hold, or for any mode but 8 bits of grey or colour: transparency or a palette,
    for example, could be read in several ways.
    """
    from PIL import Image, UnidentifiedImageError

    if not os.path.isfile(path):  # unlike Path.is_file it never raises
        raise InputError(f"no such file {path}")
    if (size_of_file := os.path.getsize(path)) > MAX_BYTES:
        raise InputError(f"{path}: {size_of_file} bytes, expected at most {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF, and of sizes, which are checked here
            # Pillow would ask a file for as many bytes as the file says it has; BytesIO has no more than there are.
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
    """Raises InputError for an image that isn't read, from its header alone."""
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
