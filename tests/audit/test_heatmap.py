"""Heat maps: a PNG that any reader opens, in which one wrong element of many stays visible."""

import base64
import struct
import zlib

import numpy as np
import pytest

from backhand.audit.heatmap import MOST, NOT_FINITE, TOO_LARGE, TOO_SMALL, heat_map


def pixels(picture):
    """The RGBA of a picture, decoded from its data URI."""
    kind, data = picture.uri.split(",")
    assert kind == "data:image/png;base64"
    png = base64.b64decode(data)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        name, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        (check,) = struct.unpack(">I", png[at + 8 + length : at + 12 + length])
        assert check == zlib.crc32(name + body)
        chunks[name], at = body, at + 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 6)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 4)


def test_signs_are_colours_and_sizes_are_strengths():
    truth = np.zeros((1, 2, 3))
    ours = np.array([[[4.0, 1, 0], [0, -4, np.nan]]])
    image = pixels(heat_map(ours, truth))
    assert image.shape == (2, 3, 4)
    assert tuple(image[0, 0]) == (*TOO_LARGE, 255)
    assert tuple(image[1, 1]) == (*TOO_SMALL, 255)
    assert tuple(image[1, 2]) == (*NOT_FINITE, 255)
    assert image[0, 2, 3] == image[1, 0, 3] == 0
    assert 0 < image[0, 1, 3] < 255


def test_one_wrong_element_of_a_large_leaf_stays_visible():
    truth = np.zeros((3, 1000, 700))
    ours = truth.copy()
    ours[2, 517, 333] = -1e-6
    picture = heat_map(ours, truth)
    assert (picture.rows, picture.columns) == (MOST, MOST)
    image = pixels(picture)
    visible = np.argwhere(image[..., 3] > 0)
    assert len(visible) == 1
    row, column = visible[0]
    assert 517 in np.array_split(np.arange(1000), MOST)[row]
    assert 333 in np.array_split(np.arange(700), MOST)[column]
    assert tuple(image[row, column]) == (*TOO_SMALL, 255)
    assert picture.description == (
        "largest difference -1e-06 at [517, 333]; 0 of 700000 elements too large, 1 too small"
    )


@pytest.mark.parametrize(
    ("shape", "cells"),
    [((), (1, 1)), ((5,), (1, 5)), ((2, 3), (2, 3)), ((2, 3, 4), (6, 4)), ((200,), (1, MOST))],
)
def test_any_number_of_axes_becomes_rows_and_columns(shape, cells):
    picture = heat_map(np.ones((2, *shape)), np.zeros((2, *shape)))
    assert (picture.rows, picture.columns) == cells
    assert (pixels(picture)[..., 3] == 255).all()


def test_equal_gradients_are_clear():
    same = np.array([[1.0, np.inf, np.nan]])
    picture = heat_map(same, same)
    assert not pixels(picture)[..., 3].any()
    assert "0 of 3 elements too large, 0 too small" in picture.description


def test_what_is_not_finite_is_said_in_words():
    picture = heat_map(np.array([[1.0, np.inf]]), np.array([[0.0, 1.0]]))
    assert picture.description.startswith("not finite at [1]; 1 of 2 elements too large")
    assert picture.description.endswith("1 not finite")


@pytest.mark.parametrize(("ours", "truth"), [((1, 0), (1, 0)), ((1, 2), (1, 3))])
def test_there_is_no_picture_of_nothing_or_of_two_shapes(ours, truth):
    assert heat_map(np.zeros(ours), np.zeros(truth)) is None
