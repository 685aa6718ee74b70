"""Reads image files as a browser shows them, and refuses what would take all memory.

A viewer sees the first frame, turned as its EXIF orientation asks, its embedded colour profile
applied, on white where it is transparent. Scoring and the gallery both use ``read_image``, so that
the scores are those of the images that people look at.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from mixgrpo.files.regular import read_regular

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
MOST_PIXELS = 2**25  # twice those of 4096x4096
MOST_BYTES = MOST_PIXELS * 8  # four channels of 16 bits, not compressed
# The published rewards resize the shorter edge to a fixed length, and the longer one in proportion.
MOST_ELONGATED = 16

_ORIENTATION = 0x0112  # EXIF's tag
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Kind of colours of a profile -> the mode that it applies to, and the modes that hold such colours.
_PROFILES = {"RGB": ("RGB", None), "GRAY": ("L", {"1", "L", "LA"}), "CMYK": ("CMYK", {"CMYK"})}

# Pillow warns of large images, which are refused here, and of damaged notes, which do not matter.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Unreadable(ValueError):
    """An image that cannot be read; the message continues "the file ... "."""


@dataclass(frozen=True)
class Seen:
    """The result of reading an image file.

    Attributes:
        digest: digest of its contents.
        size: width and height in pixels.
        fault: why the file cannot be read; empty if it can be.
    """

    digest: str = ""
    size: tuple[int, int] = (0, 0)
    fault: str = ""


def look(file: Path) -> Seen:
    """Reads and decodes a whole image file; errors are returned as a fault, not raised."""
    try:
        content = _content(file)
        return Seen(_digest(content), decode(content).size)
    except Unreadable as error:
        return Seen(fault=str(error))


def read_image(file: Path) -> Image.Image:
    """The image in RGB, as a browser shows it. Raises ``Unreadable``."""
    return decode(_content(file))


def read_picture(file: Path, digest: str) -> Tensor:
    """[3, H, W] float32 in [0, 1]; raises ValueError if the file's digest is another one."""
    try:
        content = _content(file)
    except Unreadable:
        content = b""
    if _digest(content) != digest:
        raise ValueError(f"{file} was changed during the evaluation; run the same command again")
    return pil_to_tensor(decode(content)).float() / 255


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _content(file: Path) -> bytes:
    try:
        return read_regular(file, MOST_BYTES)
    except FileNotFoundError as error:
        raise Unreadable("there is no such file") from error
    except ValueError as error:  # it is no regular file, too large, or its name contains NUL
        reason = str(error)
        own = f"{file} "
        said = reason.removeprefix(own) if reason.startswith(own) else f"cannot be read ({reason})"
        raise Unreadable(f"it {said}") from error
    except OSError as error:
        raise Unreadable(f"it cannot be read ({error.strerror or error})") from error


def decode(content: bytes) -> Image.Image:
    """Decodes an image file's contents to RGB, as a browser shows it. Raises ``Unreadable``."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(*image.size)
            _scale_transparency(image)
            image.load()
            return _turned(image, as_seen(image))
    except Unreadable:
        raise
    except Image.UnidentifiedImageError as error:
        raise Unreadable(
            f"it is not an image of the formats {', '.join(FORMATS)}; save it as one of them"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unreadable(_TOO_LARGE) from error
    except Exception as error:  # decoders raise many kinds of errors on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unreadable(f"it cannot be read ({reason}); make it again") from error


def _scale_transparency(image: Image.Image) -> None:
    """In grey of 2 or 4 bits, the decoder scales all values to 8 bits but the transparent one."""
    for _, _, _, mode in getattr(image, "tile", ()):
        if mode in ("L;2", "L;4") and isinstance(image.info.get("transparency"), int):
            image.info["transparency"] *= 255 // (2 ** int(mode[2:]) - 1)


_TOO_LARGE = (
    f"it has more than {MOST_PIXELS / 1e6:.1f} million pixels, the most that are read; make it "
    "smaller"
)


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise Unreadable(_TOO_LARGE)
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise Unreadable(
            f"it is {width}x{height}, more than {MOST_ELONGATED} times as long in one direction as "
            "in the other; cut it"
        )


def _turned(source: Image.Image, image: Image.Image) -> Image.Image:
    """The image, turned as the EXIF data of ``source`` ask; damaged data ask nothing."""
    turn = None
    with suppress(Exception):  # of as many kinds as with damaged images
        turn = _TURNED.get(source.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def as_seen(image: Image.Image) -> Image.Image:
    """An image of any mode in 8-bit RGB, with its colour profile applied, on white.

    Raises:
        Unreadable: its numbers have no definite meaning as colours.
    """
    transparency = image.info.get("transparency")
    if image.mode.startswith("I"):
        image = _of_16_bits(image)
    elif image.mode in ("F", "LAB"):
        kind = {"F": "floating-point numbers", "LAB": "colours in CIELAB"}[image.mode]
        raise Unreadable(f"it holds {kind}, which browsers do not show; save it as RGB of 8 bits")
    elif isinstance(transparency, tuple) and max(transparency) > 255:  # of 16-bit RGB
        image.info["transparency"] = tuple(value >> 8 for value in transparency)
    if not image.has_transparency_data:
        return _in_srgb(image)
    whole = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    colours = _in_srgb(image if image.mode in ("L", "LA") else whole)
    white.paste(colours, mask=whole.getchannel("A"))
    return white


def _of_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, without or with one transparent value, in 8 bits: L or LA."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise Unreadable("it holds integers of 32 bits, which browsers do not show; save it as RGB")
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:
        grey = Image.merge("LA", (grey, Image.fromarray((values != clear).astype(np.uint8) * 255)))
    grey.info["icc_profile"] = image.info.get("icc_profile")
    return grey


def _in_srgb(image: Image.Image) -> Image.Image:
    """The colours of an image in RGB. A profile that is damaged or does not fit is ignored."""
    data: Any = image.info.get("icc_profile")
    with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        mode, sources = _PROFILES[profile.profile.xcolor_space.strip()]
        is_srgb = "sRGB" in ImageCms.getProfileDescription(profile)
        if not is_srgb and (sources is None or image.mode in sources):
            converted = ImageCms.profileToProfile(
                image.convert(mode), profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            assert converted is not None
            return converted
    return image.convert("RGB")
