"""Normalization layers."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from backhand import ops
from backhand.arrays import accumulation_dtype, flag, last_axis, like_primal, upcast
from backhand.contributions import Moments, Running, Total
from backhand.ops.averages import Average, over_batch, over_features, over_groups
from backhand.ops.normalization import (
    Residuals,
    affine,
    check_groups,
    check_positions,
    normalization_backward,
)
from backhand.ops.rms_norm import Residuals as RMSResiduals
from backhand.ops.rms_norm import rms_norm_errors
from backhand.protocol import Layer, Op, Training, layer, need_floating
from backhand.visit import Params, PyTree


def layer_norm(*, eps: float = 1e-5) -> Layer:
    """Each example's features brought to mean 0 and variance 1, then scaled and shifted.

    Parameters: scale (D,), beginning at one, and offset (D,), beginning at zero. The derivation is
    with `backhand.ops.normalization`.

    Args:
        eps: added to the variance.

    Raises:
        TypeError: if x is not floating point.

    Example:
        >>> layer, x = layer_norm(eps=0.0), jnp.array([[1.0, 3.0], [10.0, 30.0]])
        >>> layer(layer.init(jax.random.key(0), x), x).tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]
    """
    return _within_examples(ops.layer_norm.bind(eps=eps), over_features)


def group_norm(groups: int, *, eps: float = 1e-5) -> Layer:
    """Each example's features, in groups of neighbours, brought to mean 0 and variance 1.

    Then scaled and shifted. Takes the statistics over all positions of the example.

    Parameters: scale (D,), beginning at one, and offset (D,), beginning at zero. The derivation is
    with `backhand.ops.normalization`.

    Args:
        groups: their number, which divides D.
        eps: added to the variance.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if D is not divisible by groups.

    Example:
        >>> layer, x = group_norm(2, eps=0.0), jnp.array([[1.0, 3.0, 10.0, 30.0]])
        >>> layer(layer.init(jax.random.key(0), x), x).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """
    op = ops.group_norm.bind(groups=groups, eps=eps)
    return _within_examples(op, lambda x: over_groups(x, groups), lambda x: check_groups(x, groups))


def instance_norm(*, eps: float = 1e-5) -> Layer:
    """Each feature of each example brought to mean 0 and variance 1 over its positions.

    Then scaled and shifted.

    Parameters: scale (D,), beginning at one, and offset (D,), beginning at zero. The derivation is
    with `backhand.ops.normalization`.

    Args:
        eps: added to the variance.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x has no axis of positions, (B, D).

    Example:
        >>> layer, x = instance_norm(eps=0.0), jnp.array([[[1.0], [3.0]]])
        >>> layer(layer.init(jax.random.key(0), x), x).tolist()
        [[[-1.0], [1.0]]]
    """
    op = ops.instance_norm.bind(eps=eps)
    return _within_examples(op, lambda x: over_groups(x, max(1, x.shape[-1])), check_positions)


def _within_examples(
    op: Op,
    average_of: Callable[[Array], Average],
    check: Callable[[tuple[int, ...]], None] = lambda shape: None,
) -> Layer:
    """A layer of an op whose statistics are those of one example."""

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        params = _init(op.name, x)
        check(x.shape)
        return params

    def forward(params: Params, x: Float[Array, "... D"]) -> tuple[Array, PyTree]:
        y, residuals = op.forward(x, params["scale"], params["offset"])
        return y, (x, residuals.mean, residuals.rstd)

    def rule(params: Params, residuals: PyTree, dy: Array) -> tuple[PyTree, Array]:
        x, mean, rstd = residuals
        own = Residuals(x, mean, rstd, params["scale"], params["offset"])
        dx, dscale, doffset = normalization_backward(own, dy, average_of(x))
        return {"scale": dscale, "offset": doffset}, dx

    return layer(op.name, init, forward, rule)


def rms_norm(*, eps: float = 1e-6) -> Layer:
    """Each example's features over the root of their mean square, then scaled.

    Parameter: scale (D,), beginning at one. The derivation is with `backhand.ops.rms_norm`.

    Args:
        eps: added to the mean square.

    Raises:
        TypeError: if x is not floating point.

    Example:
        >>> layer, x = rms_norm(eps=0.0), jnp.array([[1.0, 7.0]])
        >>> layer(layer.init(jax.random.key(0), x), x).tolist()
        [[0.2, 1.4]]
    """

    def forward(params: Params, x: Float[Array, "... D"]) -> tuple[Array, PyTree]:
        y, residuals = ops.rms_norm.forward(x, params["scale"], eps=eps)
        return y, (x, residuals.inverse)

    def rule(params: Params, residuals: PyTree, dy: Array) -> tuple[PyTree, Array]:
        dx, dscale = rms_norm_errors(RMSResiduals(residuals[0], residuals[1], params["scale"]), dy)
        return {"scale": dscale}, dx

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        return {"scale": _init("rms_norm", x)["scale"]}

    return layer("rms_norm", init, forward, rule)


def batch_norm(*, decay: float = 0.99, eps: float = 1e-5) -> Layer:
    """Each feature brought to mean 0 and variance 1 over the batch, then scaled and shifted.

    While training, by the batch's own statistics; else, and inside `freeze`, by running ones, which
    are kept among the parameters as a `Running`. They are not learned: their gradient is zero,
    `train_step` keeps the optimizer from them and merges what the `statistics` collector saw of the
    step. The variance is the biased one (divided by n) in both places.

    The running mean begins at zero. Of features whose mean is a thousand times their spread or more
    the running variance, in float32, is too small until the running mean has come near (see
    `Moments`); the batch's own statistics are not. Bring such inputs to scale first.

    Parameters: scale (D,), offset (D,), running (mean and var (D,)). Uses `training`, and a `mask`
    (B, ...) where there is one, true where x is no padding: only there it counts in the statistics.

    Args:
        decay: the share of the running statistics that a step keeps.
        eps: added to the variance.

    Raises:
        ValueError: for a decay outside [0, 1]; when run, for a mask of another shape.
        TypeError: if x is not floating point, or the mask not boolean.

    Example:
        >>> layer, x = batch_norm(eps=0.0), jnp.array([[1.0], [3.0]])
        >>> layer(layer.init(jax.random.key(0), x), x, training=True).tolist()
        [[-1.0], [1.0]]
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"batch_norm needs a decay in [0, 1], got {decay}")

    def by_its_own(training: Training) -> bool:
        return training != "frozen" and flag("batch_norm's training", training)

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        params = _init("batch_norm", x)
        running = Running(jnp.zeros_like(params["offset"]), jnp.ones_like(params["scale"]), decay)
        return {**params, "running": running}

    def forward(
        params: Params, x: Float[Array, "... D"], *, training: Training, mask: Array | None = None
    ) -> tuple[Array, PyTree]:
        need_floating("batch_norm", x)
        scale, offset = params["scale"], params["offset"]
        if by_its_own(training):
            y, residuals = ops.batch_norm.forward(x, scale, offset, mask, eps=eps)
            return y, (x, residuals.mean, residuals.rstd)
        own = _by_running(params, x)
        return affine(own.h, scale, offset).astype(x.dtype), x

    def _by_running(params: Params, x: Array) -> Residuals:
        running = lax.stop_gradient(params["running"])
        dtype = accumulation_dtype(x.dtype)
        mean, rstd = running.mean.astype(dtype), 1 / jnp.sqrt(running.var.astype(dtype) + eps)
        mean, rstd = last_axis(mean, x), last_axis(rstd, x)
        return Residuals(x, mean, rstd, params["scale"], params["offset"])

    def rule(
        params: Params,
        residuals: PyTree,
        dy: Array,
        *,
        training: Training,
        mask: Array | None = None,
    ) -> tuple[PyTree, Array]:
        if by_its_own(training):
            x, mean, rstd = residuals
            own = Residuals(x, mean, rstd, params["scale"], params["offset"], mask)
            dx, dscale, doffset = normalization_backward(own, dy, over_batch(x, mask))
            seen = _moments(own, params["running"], eps)
            return {"scale": dscale, "offset": doffset, "running": seen}, dx
        own, error = _by_running(params, residuals), upcast(dy)
        dx = error * last_axis(params["scale"].astype(error.dtype), error) * own.rstd
        return {
            "scale": Total(error * own.h),
            "offset": Total(error),
            "running": None,
        }, like_primal(dx, residuals)

    return layer("batch_norm", init, forward, rule)


def _moments(residuals: Residuals, running: Running, eps: float) -> Moments:
    """What the batch adds to the running statistics."""
    if residuals.mask is None:
        count = jnp.asarray(math.prod(residuals.x.shape[:-1]), residuals.mean.dtype)
    else:
        count = jnp.sum(residuals.mask, dtype=residuals.mean.dtype)
    shift = residuals.mean.reshape(-1) - running.mean.astype(residuals.mean.dtype)
    var = 1 / jnp.square(residuals.rstd.reshape(-1)) - eps
    return Moments(count, count * shift, count * (var + jnp.square(shift)))


def _init(name: str, x: jax.ShapeDtypeStruct) -> dict[str, Array]:
    need_floating(name, x)
    if len(x.shape) < 2:
        raise ValueError(f"{name} needs x of shape (B, ..., D), got {x.shape}")
    dtype = accumulation_dtype(x.dtype)
    return {"scale": jnp.ones(x.shape[-1], dtype), "offset": jnp.zeros(x.shape[-1], dtype)}
