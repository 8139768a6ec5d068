"""Where the windows of a convolution lie: strides, padding, dilation and groups, checked.

Output p of an axis reads the inputs s p + d k - lo for k = 0 .. K - 1: s is the stride, d the
dilation, lo the padding in front. A window reaches over d (K - 1) + 1 inputs, and with n inputs and
hi padding behind there are

    (n + lo + hi - reach) // s + 1

of them. What falls outside of the input is zero.
"""

import dataclasses
from collections.abc import Sequence

from backhand.ops.settings import Padding, PerAxis, integer, pads, per_axis

PADDINGS = ("SAME", "VALID", "CAUSAL")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The windows of a convolution: one number, or one pair, per spatial axis.

    Attributes:
        stride: from one window to the next.
        padding: zeros (in front, behind).
        dilation: from one input of a window to the next.
        groups: into how many parts the channels are split.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.stride)

    @property
    def unit(self) -> bool:
        """Whether windows neither skip inputs nor have gaps."""
        return set(self.stride) == set(self.dilation) == {1}

    @property
    def of_one_group(self) -> "Geometry":
        """The same for the channels of one group."""
        return dataclasses.replace(self, groups=1)

    @property
    def of_planes(self) -> "Geometry":
        """The same without the first axis."""
        return Geometry(self.stride[1:], self.padding[1:], self.dilation[1:], self.groups)

    def reach(self, kernel: Sequence[int]) -> tuple[int, ...]:
        """How many inputs there are from the first to the last of a window."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, kernel, strict=True))

    def places(self, sizes: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """How many windows inputs of these sizes have."""
        axes = zip(sizes, self.padding, self.reach(kernel), self.stride, strict=True)
        return tuple((n + sum(pad) - reach) // s + 1 for n, pad, reach, s in axes)

    def way_back(self, sizes: Sequence[int], kernel: Sequence[int]) -> "Geometry":
        """The windows of the turned kernel over places with stride - 1 zeros between them.

        There is one for each input; their padding may be negative, where zeros are left out.
        """
        axes = zip(
            sizes,
            self.places(sizes, kernel),
            self.reach(kernel),
            self.padding,
            self.stride,
            strict=True,
        )
        padding = ((reach - 1 - lo, n - 1 - (p - 1) * s + lo) for n, p, reach, (lo, _), s in axes)
        return Geometry((1,) * self.rank, tuple(padding), self.dilation, self.groups)


def geometry(
    name: str,
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: PerAxis,
    padding: Padding,
    dilation: PerAxis,
    groups: int,
) -> Geometry:
    """The windows of a convolution over inputs of these spatial sizes.

    Raises:
        TypeError: for a stride, dilation or number of groups that is not an integer.
        ValueError: for one below 1 or of another length, for a padding that there is not, or for a
            window that reaches beyond the padded input.
    """
    rank = len(kernel)
    strides = per_axis(name, "stride", stride, rank)
    dilations = per_axis(name, "dilation", dilation, rank)
    own = integer(name, "groups", groups)
    reach = Geometry(strides, (), dilations, own).reach(kernel)
    padded = pads(name, padding, sizes, strides, reach, PADDINGS)
    for axis, (n, pad, window) in enumerate(zip(sizes, padded, reach, strict=True)):
        if n < 1 or window > n + sum(pad):
            raise ValueError(
                f"{name} needs an input at least as large as its window: axis {axis} has {n} "
                f"inputs, padded by {pad}, for a kernel of {kernel[axis]} with dilation "
                f"{dilations[axis]}, which reaches over {window}; pad it with padding='SAME'"
            )
    return Geometry(strides, padded, dilations, own)
