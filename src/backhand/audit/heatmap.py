"""A picture of where two gradients differ, small enough to stand in a page.

Colour is for the sign and strength for the size: blue where the first is too large, orange where it
is too small, and clear where they agree, so that the picture stands on light and on dark ground.
"""

import base64
import dataclasses
import struct
import zlib

import numpy as np

MOST = 64
"""The most cells along an axis."""

TOO_LARGE, TOO_SMALL, NOT_FINITE = (37, 99, 235), (217, 95, 2), (190, 24, 93)


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """A picture of an array of differences.

    Attributes:
        uri: a PNG as a data URI, one pixel a cell.
        rows: its height in cells.
        columns: its width in cells.
        description: what it shows, in words.
    """

    uri: str
    rows: int
    columns: int
    description: str


def heat_map(ours: np.ndarray, truth: np.ndarray) -> HeatMap | None:
    """Where, and in which direction, gradients of one leaf differ.

    The last axis runs to the right, all others together downwards. A cell that stands for several
    elements shows the largest of their differences, so a single wrong element stays visible.

    Args:
        ours: (S, *shape), under S cotangents; of them too the largest difference is shown.
        truth: likewise.

    Returns:
        The picture; None for a leaf without elements, or for two of different shapes.

    Example:
        >>> wrong = heat_map(np.ones((1, 2, 3)), np.array([[[1.0, 1, 1], [1, 0, 1]]]))
        >>> wrong.description
        'largest difference +1 at [1, 1]; 1 of 6 elements too large, 0 too small'
    """
    if ours.shape != truth.shape or not truth.size:
        return None
    with np.errstate(invalid="ignore"):
        stack = np.asarray(ours, np.float64) - np.asarray(truth, np.float64)
    stack[(ours == truth) | (np.isnan(ours) & np.isnan(truth))] = 0
    stack[~np.isfinite(stack)] = np.nan
    difference = _strongest(stack, 0)
    rows = int(np.prod(difference.shape[:-1]))
    cells = difference.reshape(rows, -1)
    for axis in (0, 1):
        cells = _shrunk(cells, axis)
    return HeatMap(_uri(_colours(cells)), *cells.shape, _described(difference))


def _strongest(values: np.ndarray, axis: int) -> np.ndarray:
    """The element of largest magnitude along an axis, its sign kept; NaN counts as infinite."""
    size = np.where(np.isnan(values), np.inf, np.abs(values))
    at = np.expand_dims(np.argmax(size, axis), axis)
    return np.take_along_axis(values, at, axis).squeeze(axis)


def _shrunk(cells: np.ndarray, axis: int) -> np.ndarray:
    """At most `MOST` cells along an axis, each the strongest of its block."""
    count = min(MOST, cells.shape[axis])
    blocks = np.array_split(cells, count, axis)
    return np.stack([_strongest(block, axis) for block in blocks], axis)


def _colours(cells: np.ndarray) -> np.ndarray:
    """RGBA of each cell."""
    bad = np.isnan(cells)
    size = np.abs(np.where(bad, 0, cells))
    # The root shows what is a hundredth of the largest as a tenth of its strength.
    strength = np.sqrt(size / (size.max() or 1.0))
    image = np.empty((*cells.shape, 4), np.uint8)
    image[..., :3] = np.where((cells > 0)[..., None], TOO_LARGE, TOO_SMALL)
    image[..., 3] = np.round(255 * strength)
    image[bad] = (*NOT_FINITE, 255)
    return image


def _described(difference: np.ndarray) -> str:
    """The picture in words."""
    bad = np.isnan(difference)
    size = np.where(bad, np.inf, np.abs(difference))
    largest = np.unravel_index(int(np.argmax(size)), size.shape)
    at = f" at [{', '.join(str(int(i)) for i in largest)}]" if largest else ""
    finite = np.where(bad, 0, difference)
    noticeable = 0.01 * np.abs(finite).max()
    above, below = (int(np.sum(side > noticeable)) for side in (finite, -finite))
    value = difference[largest]
    first = f"not finite{at}" if np.isnan(value) else f"largest difference {value:+.3g}{at}"
    ill = f", {int(bad.sum())} not finite" if bad.any() else ""
    return f"{first}; {above} of {difference.size} elements too large, {below} too small{ill}"


def _uri(image: np.ndarray) -> str:
    """An RGBA image (H, W, 4) as a PNG in a data URI."""
    height, width, _ = image.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)  # 8 bits, RGBA

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
