"""Convolutions, both ways, against `lax.conv_general_dilated` and `lax.conv_transpose`.

One of a single pixel without stride is a product, and is measured against that too. PyTorch is
given both layouts. Where SAME pads more at the end than at the beginning, PyTorch pads evenly, to
the same output size.
"""

from collections.abc import Iterator
from typing import Any

from jax import Array, lax

import backhand as bh
from benchmarks.ops.case import Case, normal, sized
from benchmarks.ops.peer import Prepare, images


def numbers_of(rank: int) -> tuple[str, str, str]:
    space = "DHW"[3 - rank :]
    return f"N{space}C", f"{space}IO", f"N{space}C"


def in_torch(
    kernel: tuple[int, ...], stride: int, padding: str, dilation: int, groups: int
) -> dict[str, Prepare]:
    """PyTorch's convolution of odd kernels with SAME padding, or of one axis with causal."""
    rank = len(kernel)
    even = [dilation * (k - 1) // 2 for k in kernel]

    def convolve(functional: Any, x: Any, w: Any) -> Any:
        run = getattr(functional, f"conv{rank}d")
        if padding == "CAUSAL":
            before = functional.pad(x, (dilation * (kernel[0] - 1), 0))
            return run(before, w, None, stride, 0, dilation, groups)
        return run(x, w, None, stride, even, dilation, groups)

    return images(convolve, rank + 2)


def case(
    what: str,
    x: tuple[int, ...],
    w: tuple[int, ...],
    *,
    stride: int = 1,
    padding: str = "SAME",
    dilation: int = 1,
    groups: int = 1,
    dtype: str = "float32",
) -> Case:
    """One setting; w is (*K, I / groups, O)."""
    rank = len(x) - 2
    pads = padding if padding != "CAUSAL" else [(dilation * (w[0] - 1), 0)]

    def theirs(x: Array, w: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            w,
            (stride,) * rank,
            pads,
            rhs_dilation=(dilation,) * rank,
            dimension_numbers=numbers_of(rank),
            feature_group_count=groups,
        )

    return Case(
        "convolution",
        f"{what}, {sized(*x)}->{w[-1]}",
        lambda: (normal(*x, dtype=dtype), normal(*w, seed=1, dtype=dtype)),
        bh.ops.convolution.bind(stride=stride, padding=padding, dilation=dilation, groups=groups),
        theirs,
        in_torch(w[:-2], stride, padding, dilation, groups),
        dtype,
    )


def of_one_pixel(x: tuple[int, ...], outputs: int) -> Iterator[Case]:
    w = (1, 1, x[-1], outputs)
    yield case("1x1, against lax.conv", x, w)
    yield Case(
        "convolution",
        f"1x1, against a product, {sized(*x)}->{outputs}",
        lambda: (normal(*x), normal(*w, seed=1)),
        bh.ops.convolution,
        lambda x, w: x @ w[0, 0],
    )


def transposed(what: str, x: tuple[int, ...], w: tuple[int, ...], stride: int) -> Case:
    """One setting; w is (*K, O, I)."""
    rank, even = len(x) - 2, [(k - stride) // 2 for k in w[:-2]]

    def theirs(x: Array, w: Array) -> Array:
        return lax.conv_transpose(
            x,
            w,
            (stride,) * rank,
            "SAME",
            dimension_numbers=numbers_of(rank),
            transpose_kernel=True,
        )

    def torch(functional: Any, x: Any, w: Any) -> Any:
        return getattr(functional, f"conv_transpose{rank}d")(x, w, None, stride, even)

    return Case(
        "transposed_convolution",
        f"{what}, {sized(*x)}->{w[-2]}",
        lambda: (normal(*x), normal(*w, seed=1)),
        bh.ops.transposed_convolution.bind(stride=stride),
        theirs,
        images(torch, rank + 2),
    )


def cases() -> Iterator[Case]:
    yield case("3x3", (64, 32, 32, 32), (3, 3, 32, 32))
    yield case("3x3", (64, 16, 16, 64), (3, 3, 64, 64))
    yield case("3x3", (64, 8, 8, 128), (3, 3, 128, 128))
    yield case("3x3", (8, 14, 14, 16), (3, 3, 16, 32))
    yield case("3x3", (2, 112, 112, 64), (3, 3, 64, 64))
    yield case("3x3", (16, 16, 16, 64), (3, 3, 64, 64), dtype="bfloat16")
    yield case("5x5", (32, 16, 16, 32), (5, 5, 32, 64))
    yield from of_one_pixel((32, 28, 28, 128), 256)
    yield from of_one_pixel((8, 7, 7, 32), 32)
    yield case("3x3 stride 2", (32, 32, 32, 64), (3, 3, 64, 128), stride=2)
    yield case("1x1 stride 2", (32, 28, 28, 64), (1, 1, 64, 128), stride=2)
    yield case("7x7 stride 2", (8, 112, 112, 3), (7, 7, 3, 64), stride=2)
    yield case("3x3 dilated by 2", (16, 32, 32, 32), (3, 3, 32, 32), dilation=2)
    yield case("3x3 in 8 groups", (32, 16, 16, 64), (3, 3, 8, 64), groups=8)
    yield case("3x3 in 2 groups", (32, 16, 16, 64), (3, 3, 32, 64), groups=2)
    yield case("depthwise 3x3", (32, 32, 32, 32), (3, 3, 1, 32), groups=32)
    yield case("depthwise 3x3", (8, 56, 56, 96), (3, 3, 1, 96), groups=96)
    yield case("depthwise 3x3", (4, 8, 8, 16), (3, 3, 1, 16), groups=16)
    yield case("depthwise 3x3 stride 2", (16, 56, 56, 96), (3, 3, 1, 96), stride=2, groups=96)
    yield case("depthwise 7x7", (8, 28, 28, 96), (7, 7, 1, 96), groups=96)
    yield case("depthwise 3x3, 2 outputs", (8, 28, 28, 32), (3, 3, 1, 64), groups=32)
    yield case("depthwise 3x3, 32 outputs", (4, 16, 16, 2), (3, 3, 1, 64), groups=2)
    yield case("causal 4", (16, 512, 64), (4, 64, 64), padding="CAUSAL")
    yield case("causal 3 dilated by 8", (8, 512, 64), (3, 64, 64), padding="CAUSAL", dilation=8)
    yield case("causal depthwise 4", (16, 512, 256), (4, 1, 256), padding="CAUSAL", groups=256)
    yield case("3x3x3", (8, 8, 16, 16, 16), (3, 3, 3, 16, 32))
    yield case("3x3x3", (2, 4, 4, 4, 256), (3, 3, 3, 256, 256))
    yield case("3x3x3 stride 2", (2, 16, 32, 32, 16), (3, 3, 3, 16, 32), stride=2)
    yield transposed("4x4 stride 2", (32, 8, 8, 128), (4, 4, 64, 128), 2)
    yield transposed("4x4 stride 2", (32, 16, 16, 64), (4, 4, 3, 64), 2)
    yield transposed("2x2 stride 2", (16, 14, 14, 64), (2, 2, 32, 64), 2)
