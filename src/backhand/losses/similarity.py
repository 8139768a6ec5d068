"""Losses of vectors that should be near, or far: cosine and triplet.

With u the direction x / |x| of a vector, the error du of the direction comes back as

    dx = (du - u (u du)) / |x|

since the length of x changes nothing. A vector shorter than EPS is divided by EPS instead.

    cosine       l = 1 - u_x u_t                                           du_x = -u_t
    triplet      l = max(0, |a - p| - |a - n| + m)                         da = e_p - e_n
                 dp = -e_p and dn = e_n, with e the unit vectors of the differences, where l > 0
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from backhand.arrays import like_primal, upcast
from backhand.losses.common import (
    Sum,
    check_weights,
    masked,
    pair,
    target_error,
    weighted_sum,
    weighted_sum_backward,
)
from backhand.protocol import Loss, need_floating
from backhand.visit import PyTree

EPS = 1e-6
"""The length that a vector is divided by at least."""


class Triplets(NamedTuple):
    """What came in, and the distances of the anchors from positives and from negatives."""

    predictions: PyTree
    weights: Array | None
    near: Float[Array, "*positions"]
    far: Float[Array, "*positions"]


def cosine_distance_forward(
    predictions: Float[Array, "*positions D"], targets: Array, weights: Array | None = None
) -> tuple[Sum, tuple[Array | None, ...]]:
    """sum(w l) and sum(w), with l = 1 - cos(x, t) for each vector x.

    Args:
        predictions: (B, ..., D).
        targets: of the same shape.
        weights: per example or per vector; see `weighted_sum`.

    Raises:
        TypeError: if predictions are not floating point.
        ValueError: if the shapes differ.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> total, _ = bh.losses.cosine_distance(jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0]]))
        >>> float(total)
        1.0
    """
    x, t = pair("cosine_distance", predictions, targets)
    if predictions.ndim == 0:
        raise ValueError("cosine_distance needs vectors (..., D), got a scalar")
    lengths = length_of(x), length_of(t)
    cosine = jnp.sum(x * t, -1, keepdims=True) / lengths[0] / lengths[1]
    total = weighted_sum("cosine_distance", 1 - cosine[..., 0], weights)
    return total, (predictions, targets, weights, cosine, *lengths)


def cosine_distance_backward(
    residuals: tuple[Array, Array, Array | None, Array, Array, Array], dy: Sum
) -> tuple[Array, Array | None, Array | None]:
    predictions, targets, weights, cosine, *lengths = residuals
    x, t = pair("", predictions, targets)
    dlosses, dweights = weighted_sum_backward(1 - cosine[..., 0], weights, dy)

    def error(x: Array, length: Array, t: Array, other: Array) -> Array:
        along = jnp.where(length > EPS, cosine, 0) / length
        return masked(dlosses[..., None], (x * along - t / other) / length)

    dx, dt = error(x, lengths[0], t, lengths[1]), error(t, lengths[1], x, lengths[0])
    return like_primal(dx, predictions), target_error(dt, targets), dweights


def cosine_distance_reference(x: Array, t: Array, weights: Array | None = None) -> Sum:
    x, t = pair("", x, t)
    return weighted_sum("", 1 - jnp.sum(textbook_unit(x) * textbook_unit(t), -1), weights)


def triplet_forward(
    predictions: PyTree, targets: None = None, weights: Array | None = None, *, margin: float = 1.0
) -> tuple[Sum, Triplets]:
    """sum(w l) and sum(w), with l = max(0, |a - p| - |a - n| + m) for each triplet.

    The distance |e| is sqrt(sum e^2 + EPS), which has a slope at 0. All three are predictions, of
    one model as a rule: a batch of an objective has no targets.

    Args:
        predictions: anchors a, positives p, which should be nearer, and negatives n, which should
            be farther by the margin: a tuple of three (B, ..., D), or one array (B, 3, ..., D).
        targets: None.
        weights: per example or per triplet; see `weighted_sum`.
        margin: m above 0.

    Raises:
        TypeError: if an array is not floating point, or there are targets.
        ValueError: if there are not three of one shape, or the margin is not above 0.

    Example:
        >>> import backhand as bh, jax, jax.numpy as jnp
        >>> a, p, n = jnp.zeros((1, 2)), jnp.array([[3.0, 4.0]]), jnp.array([[6.0, 8.0]])
        >>> total, _ = bh.losses.triplet((a, p, n), margin=6.0)
        >>> round(float(total), 4)
        1.0

        One encoder of all three, in a batch of (B, 3, F):

        >>> loss = bh.objective(bh.dense(2), bh.losses.triplet.bind(margin=0.5))
        >>> batch = {"inputs": jnp.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)}
        >>> value, grads = bh.value_and_grad(loss)(loss.init(jax.random.key(0), batch), batch)
        >>> grads["w"].shape
        (4, 2)

    References:
        Schroff et al., "FaceNet", 2015.
    """
    if not margin > 0:
        raise ValueError(f"triplet needs a margin above 0, got {margin}")
    if targets is not None:
        raise TypeError(
            "triplet has no targets: give its three together, as in triplet((anchors, positives, "
            "negatives), weights=weights)"
        )
    three = _three(predictions)
    for name, x in zip(("anchors", "positives", "negatives"), three, strict=True):
        need_floating(f"triplet's {name}", x)
        if x.shape != three[0].shape or x.ndim == 0:
            raise ValueError(
                f"triplet needs {name} of shape {three[0].shape}, as its anchors; got {x.shape}"
            )
    near, far = _distances(*three)
    losses = jnp.maximum(near - far + margin, 0)
    return weighted_sum("triplet", losses, weights), Triplets(predictions, weights, near, far)


def triplet_backward(
    residuals: Triplets, dy: Sum, *, margin: float = 1.0
) -> tuple[PyTree, None, Array | None]:
    predictions, weights, near, far = residuals
    a, p, n = _three(predictions)
    losses = jnp.maximum(near - far + margin, 0)
    dlosses, dweights = weighted_sum_backward(losses, weights, dy)
    wide, blamed = upcast(a), losses > 0
    active = jnp.where(blamed, dlosses, 0)

    def error(other: Array, distance: Array) -> Array:
        # The quotient comes last, so that XLA computes it once a triplet, and not again for each
        # number of its vectors; so is what is not finite asked of the distance, not of each.
        share = active / jnp.where(blamed, distance, 1)
        left_out = (share == 0) & ~jnp.isfinite(distance)
        away = jnp.where(left_out[..., None], 0, wide - other.astype(wide.dtype))
        return share[..., None] * away

    dp, dn = -error(p, near), error(n, far)
    errors = like_primal(-(dp + dn), a), like_primal(dp, p), like_primal(dn, n)
    return errors if isinstance(predictions, tuple) else jnp.stack(errors, 1), None, dweights


def _three(predictions: PyTree) -> tuple[Array, Array, Array]:
    """Anchors, positives and negatives.

    Raises:
        ValueError: if there are not three.
    """
    if isinstance(predictions, tuple):
        shape, three = f"a tuple of {len(predictions)}", predictions
    else:
        shape = str(predictions.shape)
        fits = len(predictions.shape) > 1 and predictions.shape[1] == 3
        three = tuple(predictions[:, i] for i in range(3)) if fits else ()
    if len(three) != 3:
        raise ValueError(
            "triplet needs predictions (anchors, positives, negatives), or one array "
            f"(B, 3, ..., D) of them; got {shape}"
        )
    return three


def _distances(a: Array, p: Array, n: Array) -> tuple[Array, Array]:
    """Those of the anchors from their positives and their negatives."""
    wide = upcast(a)
    near, far = (jnp.sum(jnp.square(wide - x.astype(wide.dtype)), -1) for x in (p, n))
    return jnp.sqrt(near + EPS), jnp.sqrt(far + EPS)


def triplet_reference(
    predictions: PyTree, targets: None = None, weights: Array | None = None, *, margin: float = 1.0
) -> Sum:
    a, p, n = predictions if isinstance(predictions, tuple) else jnp.moveaxis(predictions, 1, 0)
    a = upcast(a)
    near = jnp.sum((a - p.astype(a.dtype)) ** 2, -1)
    far = jnp.sum((a - n.astype(a.dtype)) ** 2, -1)
    losses = jax.nn.relu((near + EPS) ** 0.5 - (far + EPS) ** 0.5 + margin)
    return weighted_sum("", losses, weights)


def length_of(x: Array) -> Array:
    """Lengths, with an axis for them; of what is shorter than EPS, EPS."""
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), EPS**2))


def textbook_unit(x: Array) -> Array:
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x**2, -1, keepdims=True), EPS**2))


cosine_distance = Loss(
    "cosine_distance",
    cosine_distance_forward,
    cosine_distance_backward,
    cosine_distance_reference,
    check_weights,
)
triplet = Loss(
    "triplet",
    triplet_forward,
    triplet_backward,
    triplet_reference,
    check_weights,
    has_targets=False,
)
