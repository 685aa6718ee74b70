"""Images of every kind become what a browser shows, or one sentence about why they do not."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from mixgrpo.evaluation.pictures import (
    MOST_PIXELS,
    Unreadable,
    as_seen,
    decode,
    look,
    read_image,
    read_picture,
)

RED, HIDDEN = (200, 10, 20), (0, 0, 255)


def saved(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colours: int, rows: bytes, **more: bytes) -> bytes:
    """A PNG by its parts: ``colours`` is 0 for grey, 2 RGB, 3 palette, 4 grey with alpha."""
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    parts = [(b"IHDR", head), *((name.encode(), data) for name, data in more.items())]
    parts += [(b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def seen(content: bytes) -> list[tuple[int, ...]]:
    """The pixels of the first row."""
    image = decode(content)
    assert image.mode == "RGB"
    return [tuple(map(int, pixel)) for pixel in np.asarray(image)[0]]


def two(mode: str, *pixels: Any) -> Image.Image:
    """An image of one row."""
    image = Image.new(mode, (len(pixels), 1))
    for place, pixel in enumerate(pixels):
        image.putpixel((place, 0), pixel)
    return image


# ---- transparency

RGBA = two("RGBA", (*RED, 255), (*HIDDEN, 0), (0, 0, 0, 128))
ON_WHITE = [RED, (255, 255, 255), (127, 127, 127)]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_a_transparent_picture_lies_on_white(kind):
    assert seen(saved(RGBA, kind, **({"lossless": True} if kind == "WEBP" else {}))) == ON_WHITE


def test_premultiplied_colours_lie_on_white():
    found = np.asarray(as_seen(RGBA.convert("RGBa")))[0].tolist()
    assert found == [list(pixel) for pixel in ON_WHITE]


def palette(transparency: bytes | int) -> bytes:
    image = two("P", 0, 1, 2)
    image.putpalette([*RED, *HIDDEN, 0, 0, 0])
    return saved(image, transparency=transparency)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (palette(1), [RED, (255, 255, 255), (0, 0, 0)]),
        (palette(bytes([255, 0, 128])), ON_WHITE),
        (saved(two("LA", (9, 255), (9, 0))), [(9, 9, 9), (255, 255, 255)]),
        (saved(two("L", 9, 0), transparency=0), [(9, 9, 9), (255, 255, 255)]),
        (png(2, 1, 4, 0, b"\0\x5a", tRNS=b"\0\5"), [(255, 255, 255), (170, 170, 170)]),
        (png(4, 1, 2, 0, b"\0\x1b", tRNS=b"\0\1"),
         [(0, 0, 0), (255, 255, 255), (170, 170, 170), (255, 255, 255)]),
        (saved(two("RGB", RED, HIDDEN), transparency=HIDDEN), [RED, (255, 255, 255)]),
        (saved(two("1", 255, 0), transparency=0), [(255, 255, 255), (255, 255, 255)]),
        (saved(two("P", 0, 1), "GIF", transparency=1), [(0, 0, 0), (255, 255, 255)]),
        (png(2, 1, 16, 4, b"\0" + struct.pack(">4H", 0x8000, 0, 0x1234, 65535)),
         [(255, 255, 255), (18, 18, 18)]),
        (png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 0x8000, 0x8001), tRNS=b"\x80\0"),
         [(255, 255, 255), (128, 128, 128)]),
        (png(2, 1, 16, 2, b"\0" + struct.pack(">6H", *[0x8000] * 3, *[0] * 3),
             tRNS=struct.pack(">3H", *[0x8000] * 3)), [(255, 255, 255), (0, 0, 0)]),
    ],
)  # fmt: skip
def test_transparency_of_every_kind(content, expected):
    assert seen(content) == expected


def test_palettes_with_alpha():
    image = two("P", 0, 1)
    image.putpalette([*RED, *HIDDEN])
    with_alpha = image.convert("PA")
    with_alpha.putalpha(two("L", 255, 0))
    assert np.asarray(as_seen(with_alpha))[0].tolist() == [list(RED), [255, 255, 255]]


# ---- depth and colours

GREYS = np.array([[0, 257, 0x8000, 0xFE01, 65535]], np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_keeps_its_shades(kind):
    assert [r for r, _, _ in seen(saved(Image.fromarray(GREYS), kind))] == [0, 1, 128, 254, 255]


def test_grey_and_colour_of_16_bits_agree():
    grey = png(5, 1, 16, 0, b"\0" + GREYS.astype(">u2").tobytes())
    colour = png(5, 1, 16, 2, b"\0" + GREYS.repeat(3).astype(">u2").tobytes())
    assert seen(grey) == seen(colour)


def test_big_endian_grey():
    assert seen(saved(Image.fromarray(GREYS.astype(">u2")), "TIFF")) == [
        (v, v, v) for v in (0, 1, 128, 254, 255)
    ]


def test_few_bits():
    assert seen(png(4, 1, 2, 0, b"\0\x1b")) == [(v, v, v) for v in (0, 85, 170, 255)]
    assert seen(saved(two("1", 0, 255))) == [(0, 0, 0), (255, 255, 255)]


def test_print_colours():
    found = decode(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).getpixel((8, 8))
    assert found == pytest.approx((255, 0, 0), abs=3)
    found = decode(saved(Image.new("YCbCr", (16, 16), (76, 85, 255)), "JPEG")).getpixel((8, 8))
    assert found == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (saved(Image.new("F", (4, 4), 0.5), "TIFF"), "it holds floating-point numbers"),
        (saved(Image.new("LAB", (4, 4)), "TIFF"), "it holds colours in CIELAB"),
        (saved(Image.new("I", (4, 4), 2**20), "TIFF"), "it holds integers of 32 bits"),
        (saved(Image.new("I", (4, 4), -1), "TIFF"), "it holds integers of 32 bits"),
    ],
)
def test_numbers_that_are_no_colours(content, fault):
    with pytest.raises(Unreadable, match=f"^{fault}, which browsers do not show; save it as RGB"):
        decode(content)


def wide_gamut() -> bytes:
    """A profile like sRGB's whose red and green change places, which is easily seen."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for name, other in ((b"rXYZ", b"?XYZ"), (b"gXYZ", b"rXYZ"), (b"?XYZ", b"gXYZ")):
        place = profile.index(name)
        profile[place : place + 4] = other
    return bytes(profile.replace(b"s\0R\0G\0B", b"o\0t\0h\0e"))


def test_an_embedded_profile_is_applied():
    found = seen(saved(two("RGB", (255, 0, 0), (0, 255, 0)), icc_profile=wide_gamut()))
    assert found[0] == pytest.approx((0, 255, 0), abs=4)
    assert found[1] == pytest.approx((255, 0, 0), abs=4)
    with_alpha = two("RGBA", (255, 0, 0, 255), (255, 0, 0, 0))
    found = seen(saved(with_alpha, icc_profile=wide_gamut()))
    assert found[0] == pytest.approx((0, 255, 0), abs=4)
    assert found[1] == (255, 255, 255)


@pytest.mark.parametrize(
    "profile",
    [
        b"",
        b"damaged",
        wide_gamut()[:200],
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    ],
)
@pytest.mark.parametrize("pixels", [two("RGB", RED, HIDDEN), two("L", 3, 77)])
def test_a_profile_that_asks_nothing_changes_nothing(profile, pixels):
    expected = [tuple(p) for p in np.asarray(pixels.convert("RGB"))[0].tolist()]
    assert seen(saved(pixels, icc_profile=profile)) == expected


# ---- orientation and frames

CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
TURNED = {
    1: "rgby", 2: "gryb", 3: "ybgr", 4: "byrg", 5: "rbgy", 6: "bryg", 7: "ygbr", 8: "gyrb"
}  # fmt: skip


def with_orientation(value: Any, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return saved(Image.fromarray(CORNERS), kind, exif=exif.tobytes())


@pytest.mark.parametrize("value", [*TURNED, 0, 9, 77])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_picture_is_turned_as_its_camera_noted(value, kind):
    names = {(255, 0, 0): "r", (0, 255, 0): "g", (0, 0, 255): "b", (255, 255, 0): "y"}
    found = np.asarray(decode(with_orientation(value, kind))).reshape(4, 3).tolist()
    assert "".join(names[tuple(pixel)] for pixel in found) == TURNED.get(value, "rgby")


def test_the_size_is_that_of_the_turned_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(saved(Image.new("RGB", (32, 16)), "JPEG", exif=exif))
    found = look(tmp_path / "a.jpg")
    assert found.size == (16, 32)
    assert read_picture(tmp_path / "a.jpg", found.digest).shape == (3, 32, 16)


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nothing", b"Exif"])
def test_damaged_notes_of_a_camera_do_not_matter(exif):
    assert decode(saved(Image.fromarray(CORNERS), "JPEG", exif=exif)).size == (2, 2)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_counts(kind):
    first, second = Image.new("RGB", (8, 8), (250, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 250))
    how: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    content = saved(first, kind, save_all=True, append_images=[second], **how)
    assert decode(content).getpixel((4, 4)) == pytest.approx((250, 0, 0), abs=2)


# ---- sizes


def zeros(width: int, height: int) -> bytes:
    """A PNG that is small for its size."""
    return png(width, height, 1, 0, b"\0" * ((width + 7) // 8 + 1) * height)


@pytest.mark.parametrize("size", [(13000, 13000), (20000, 20000), (60000, 60000), (8192, 4097)])
def test_a_picture_of_too_many_pixels_is_not_decoded(size):
    content = zeros(*size) if size[0] < 10_000 else png(*size, 1, 0, b"")
    with pytest.raises(Unreadable, match=r"more than 33\.6 million pixels.*; make it smaller$"):
        decode(content)


def test_the_largest_picture_is_read():
    assert decode(zeros(8192, 4096)).size[0] * 4096 == MOST_PIXELS


@pytest.mark.parametrize("size", [(1, 17), (20000, 1), (100, 1700)])
def test_a_picture_that_resizing_would_blow_up(size):
    with pytest.raises(Unreadable, match=rf"^it is {size[0]}x{size[1]}, more than 16 times as"):
        decode(zeros(*size))
    assert decode(zeros(1, 16)).size == (1, 16)


# ---- files


def fifo(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


WHOLE = saved(Image.effect_noise((64, 64), 90))
FILES = {
    "there is no such file": lambda path: None,
    "it is a FIFO, not a regular file": fifo,
    "it is a device, not a regular file": lambda path: path.symlink_to("/dev/zero"),
    "it is a folder, not a regular file": lambda path: path.mkdir(),
    "it is larger than 256 MiB, the most that is read": sparse,
    "it cannot be read (Too many levels": lambda path: path.symlink_to(path),
    "it is not an image of the formats PNG, JPEG,": lambda path: path.write_bytes(b""),
    "it is not an image of the formats": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0"),
    "it cannot be read (": lambda path: path.write_bytes(WHOLE[: len(WHOLE) // 2]),
}


@pytest.mark.parametrize("fault", FILES)
def test_what_is_no_picture_is_one_sentence(tmp_path, fault):
    path = tmp_path / "a.png"
    FILES[fault](path)
    assert look(path).fault.startswith(fault)
    with pytest.raises(Unreadable):
        read_image(path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\udcff.png", "a" * 5000])
def test_names_of_files_that_cannot_be(tmp_path, name):
    assert look(tmp_path / name).fault


def test_a_link_to_a_picture_elsewhere_is_read(tmp_path):
    (tmp_path / "there.png").write_bytes(WHOLE)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.png").symlink_to(tmp_path / "there.png")
    assert look(tmp_path / "here" / "a.png").size == (64, 64)


def test_a_picture_that_changes_between_reading_and_scoring(tmp_path):
    (tmp_path / "a.png").write_bytes(WHOLE)
    digest = look(tmp_path / "a.png").digest
    assert read_picture(tmp_path / "a.png", digest).shape == (3, 64, 64)
    (tmp_path / "a.png").write_bytes(saved(RGBA))
    with pytest.raises(ValueError, match=r"a\.png was changed during the evaluation; run"):
        read_picture(tmp_path / "a.png", digest)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="was changed"):
        read_picture(tmp_path / "a.png", digest)
