"""Normalization: x brought to mean 0 and variance 1, then scaled and shifted.

With mean m and variance v of x over n elements, r = 1 / sqrt(v + eps) and h = (x - m) r:

    y = h scale + offset

The error g = dy scale of h reaches x directly, and through m and through v, which every element of
the group takes part in. Their paths take out of g its mean and its part along h:

    dx = r (g - mean(g) - h mean(g h))
    dscale = sum(dy h)        doffset = sum(dy)

Layer normalization takes the group to be the features of one example; batch normalization one
feature of all examples; group normalization some neighbouring features of one example, everywhere
in it; instance normalization one feature of one example. All of it runs in at least float32, the
variance around the mean, so that a large mean does not cancel.

Under a mask, batch normalization brings every position to scale, and takes m and v from those that
are not padding. A padded position then has no part in the last two paths of dx, while its own error
still goes down them to the others: the means are sums over all positions over the number in the
mask.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from backhand.arrays import last_axis, like_primal, need_mask, upcast
from backhand.contributions import Total, total
from backhand.ops.averages import Average, over_batch, over_features, over_groups
from backhand.ops.settings import integer
from backhand.protocol import Op, need_floating


class Residuals(NamedTuple):
    """x and the statistics of its groups; the normalised h is computed again from them."""

    x: Float[Array, "... D"]
    mean: Float[Array, "..."]
    rstd: Float[Array, "..."]
    scale: Float[Array, " D"]
    offset: Float[Array, " D"]
    mask: Bool[Array, "..."] | None = None

    @property
    def h(self) -> Float[Array, "... D"]:
        """(x - mean) / std, in at least float32."""
        return (upcast(self.x) - self.mean) * self.rstd


def layer_norm_forward(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    offset: Float[Array, " D"],
    *,
    eps: float = 1e-5,
) -> tuple[Float[Array, "... D"], Residuals]:
    """Layer normalization over the last axis.

    Args:
        x: inputs (..., D).
        scale: (D,).
        offset: (D,).
        eps: added to the variance.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if scale or offset is not (D,).

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> y = bh.ops.layer_norm(jnp.array([[1.0, 3.0]]), jnp.ones(2), jnp.zeros(2), eps=0.0)
        >>> y.tolist()
        [[-1.0, 1.0]]

    References:
        Ba, Kiros and Hinton, "Layer normalization", 2016.
    """
    return _normalize("layer_norm", x, scale, offset, over_features(x), eps)


def batch_norm_forward(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    offset: Float[Array, " D"],
    mask: Bool[Array, "..."] | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Float[Array, "... D"], Residuals]:
    """Batch normalization, as in training: over every axis but the last.

    Args:
        x: inputs (B, ..., D).
        scale: (D,).
        offset: (D,).
        mask: (B, ...), true where x is no padding: only there it counts in mean and variance.
        eps: added to the variance.

    Raises:
        TypeError: if x is not floating point, or the mask not boolean.
        ValueError: if scale or offset is not (D,), or the mask not (B, ...).

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> y = bh.ops.batch_norm(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.zeros(1), eps=0.0)
        >>> y.tolist()
        [[-1.0], [1.0]]

    References:
        Ioffe and Szegedy, "Batch normalization", 2015.
    """
    if mask is None:
        return _normalize("batch_norm", x, scale, offset, over_batch(x), eps)
    of_lengths = "of lengths it is jnp.arange(T)[None] < lengths[:, None]"
    need_mask("batch_norm", mask, of_lengths)
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"batch_norm needs a mask of the shape of x {x.shape} without its features, "
            f"{x.shape[:-1]}, got {mask.shape}"
        )
    return _normalize("batch_norm", x, scale, offset, over_batch(x, mask), eps, mask)


def group_norm_forward(
    x: Float[Array, "B ... D"],
    scale: Float[Array, " D"],
    offset: Float[Array, " D"],
    *,
    groups: int,
    eps: float = 1e-5,
) -> tuple[Float[Array, "B ... D"], Residuals]:
    """Group normalization: over all of an example and D / groups neighbouring features.

    With as many groups as features it is instance normalization.

    Args:
        x: inputs (B, ..., D).
        scale: (D,).
        offset: (D,).
        groups: their number, which divides D.
        eps: added to the variance.

    Raises:
        TypeError: if x is not floating point, or groups not an integer.
        ValueError: if scale or offset is not (D,), or D is not divisible by groups.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
        >>> bh.ops.group_norm(x, jnp.ones(4), jnp.zeros(4), groups=2, eps=0.0).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    References:
        Wu and He, "Group normalization", 2018.
    """
    need_floating("group_norm", x)
    check_groups(x.shape, groups)
    return _normalize("group_norm", x, scale, offset, over_groups(x, groups), eps)


def instance_norm_forward(
    x: Float[Array, "B ... D"],
    scale: Float[Array, " D"],
    offset: Float[Array, " D"],
    *,
    eps: float = 1e-5,
) -> tuple[Float[Array, "B ... D"], Residuals]:
    """Instance normalization: over all positions of one example, each feature alone.

    Args:
        x: inputs (B, *positions, D), with at least one axis of positions.
        scale: (D,).
        offset: (D,).
        eps: added to the variance.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if scale or offset is not (D,), or x has no positions.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> x = jnp.array([[[1.0], [3.0]], [[10.0], [30.0]]])
        >>> bh.ops.instance_norm(x, jnp.ones(1), jnp.zeros(1), eps=0.0).ravel().tolist()
        [-1.0, 1.0, -1.0, 1.0]

    References:
        Ulyanov, Vedaldi and Lempitsky, "Instance normalization", 2016.
    """
    check_affine("instance_norm", x, scale, offset)
    check_positions(x.shape)
    return _normalize("instance_norm", x, scale, offset, over_groups(x, max(1, x.shape[-1])), eps)


def check_positions(shape: tuple[int, ...]) -> None:
    """Refuses features without positions: each would be its own mean, and y the offset.

    Raises:
        ValueError: saying what there is.
    """
    if len(shape) < 3:
        raise ValueError(
            "instance_norm needs x of shape (B, *positions, D) with at least one axis of "
            f"positions, got {shape}; features alone are for layer_norm or group_norm"
        )


def check_groups(shape: tuple[int, ...], groups: int) -> None:
    """Refuses features that are not divisible.

    Raises:
        TypeError: if groups is not an integer.
        ValueError: saying how many there are.
    """
    if shape[-1] % integer("group_norm", "groups", groups):
        raise ValueError(
            f"group_norm needs a number of groups that divides the {shape[-1]} features of x "
            f"{shape}, got groups={groups}"
        )


def _normalize(
    name: str,
    x: Array,
    scale: Array,
    offset: Array,
    average: Average,
    eps: float,
    mask: Array | None = None,
) -> tuple[Array, Residuals]:
    check_affine(name, x, scale, offset)
    wide = upcast(x)
    mean = average(_where(mask, wide))
    # x - mean, used again, XLA on CPU would write to memory first; x + -mean it sums as it goes.
    rstd = 1 / jnp.sqrt(average(_where(mask, jnp.square(wide + -mean))) + eps)
    residuals = Residuals(x, mean, rstd, scale, offset, mask)
    return affine(residuals.h, scale, offset).astype(x.dtype), residuals


def check_affine(name: str, x: Array, *parameters: Array) -> None:
    """Refuses x and parameters that do not fit.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x is not (B, ..., D), or a parameter not (D,).
    """
    need_floating(name, x)
    if x.ndim < 2 or any(p.shape != x.shape[-1:] for p in parameters):
        names = "scale and offset" if len(parameters) == 2 else "scale"
        raise ValueError(
            f"{name} needs x of shape (B, ..., D) with {names} of shape (D,), got "
            f"{', '.join(str(p.shape) for p in (x, *parameters[:-1]))} and {parameters[-1].shape}"
        )


def normalization_backward(
    residuals: Residuals, dy: Float[Array, "... D"], average: Average
) -> tuple[Float[Array, "... D"], Total, Total]:
    """The errors of x, scale and offset, the last two not yet summed."""
    h, dy, mask = residuals.h, upcast(dy), residuals.mask
    if mask is not None:  # padding may hold anything, NaN too: without an error it adds nothing
        h = jnp.where(mask[..., None] | (dy != 0), h, 0)
    scale = residuals.scale.astype(dy.dtype)
    doffset, dscale = average.sums(dy), average.sums(dy * h)
    means = average.mean(doffset, scale) + h * average.mean(dscale, scale)
    dx = residuals.rstd * (dy * last_axis(scale, dy) - _where(mask, means))
    return like_primal(dx, residuals.x), Total(dscale), Total(doffset)


def layer_norm_backward(
    residuals: Residuals, dy: Float[Array, "... D"], *, eps: float = 1e-5
) -> tuple[Float[Array, "... D"], Float[Array, " D"], Float[Array, " D"]]:
    dx, dscale, doffset = normalization_backward(residuals, dy, over_features(dy))
    return dx, total(dscale, residuals.scale), total(doffset, residuals.offset)


def batch_norm_backward(
    residuals: Residuals, dy: Float[Array, "... D"], *, eps: float = 1e-5
) -> tuple[Float[Array, "... D"], Float[Array, " D"], Float[Array, " D"], None]:
    dx, dscale, doffset = normalization_backward(residuals, dy, over_batch(dy, residuals.mask))
    return dx, total(dscale, residuals.scale), total(doffset, residuals.offset), None


def group_norm_backward(
    residuals: Residuals, dy: Float[Array, "B ... D"], *, groups: int, eps: float = 1e-5
) -> tuple[Float[Array, "B ... D"], Float[Array, " D"], Float[Array, " D"]]:
    dx, dscale, doffset = normalization_backward(residuals, dy, over_groups(dy, groups))
    return dx, total(dscale, residuals.scale), total(doffset, residuals.offset)


def instance_norm_backward(
    residuals: Residuals, dy: Float[Array, "B ... D"], *, eps: float = 1e-5
) -> tuple[Float[Array, "B ... D"], Float[Array, " D"], Float[Array, " D"]]:
    return group_norm_backward(residuals, dy, groups=max(1, dy.shape[-1]), eps=eps)


def affine(
    h: Float[Array, "... D"], scale: Float[Array, " D"], offset: Float[Array, " D"]
) -> Float[Array, "... D"]:
    """h scale + offset, in the dtype of h."""
    return h * last_axis(scale.astype(h.dtype), h) + last_axis(offset.astype(h.dtype), h)


def _where(mask: Array | None, x: Array) -> Array:
    """x where it is no padding, else 0."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def layer_norm_reference(x: Array, scale: Array, offset: Array, *, eps: float = 1e-5) -> Array:
    wide = upcast(x)
    mean, var = jnp.mean(wide, -1, keepdims=True), jnp.var(wide, -1, keepdims=True)
    return affine((wide - mean) / jnp.sqrt(var + eps), scale, offset).astype(x.dtype)


def batch_norm_reference(
    x: Array, scale: Array, offset: Array, mask: Array | None = None, *, eps: float = 1e-5
) -> Array:
    wide, axes = upcast(x), tuple(range(x.ndim - 1))
    if mask is None:
        mean, var = jnp.mean(wide, axes, keepdims=True), jnp.var(wide, axes, keepdims=True)
    else:
        seen = mask[..., None].astype(wide.dtype)
        count = jnp.maximum(1, jnp.sum(seen))
        mean = jnp.sum(seen * wide, axes, keepdims=True) / count
        var = jnp.sum(seen * (wide - mean) ** 2, axes, keepdims=True) / count
    return affine((wide - mean) / jnp.sqrt(var + eps), scale, offset).astype(x.dtype)


def group_norm_reference(
    x: Array, scale: Array, offset: Array, *, groups: int, eps: float = 1e-5
) -> Array:
    positions = math.prod(x.shape[1:-1])
    wide = upcast(x).reshape(x.shape[0], positions, groups, x.shape[-1] // groups)
    mean, var = jnp.mean(wide, (1, 3), keepdims=True), jnp.var(wide, (1, 3), keepdims=True)
    h = ((wide - mean) / jnp.sqrt(var + eps)).reshape(x.shape)
    return affine(h, scale, offset).astype(x.dtype)


def instance_norm_reference(x: Array, scale: Array, offset: Array, *, eps: float = 1e-5) -> Array:
    wide, axes = upcast(x), tuple(range(1, x.ndim - 1))
    mean, var = jnp.mean(wide, axes, keepdims=True), jnp.var(wide, axes, keepdims=True)
    return affine((wide - mean) / jnp.sqrt(var + eps), scale, offset).astype(x.dtype)


layer_norm = Op("layer_norm", layer_norm_forward, layer_norm_backward, layer_norm_reference)
batch_norm = Op("batch_norm", batch_norm_forward, batch_norm_backward, batch_norm_reference)
group_norm = Op("group_norm", group_norm_forward, group_norm_backward, group_norm_reference)
instance_norm = Op(
    "instance_norm", instance_norm_forward, instance_norm_backward, instance_norm_reference
)
