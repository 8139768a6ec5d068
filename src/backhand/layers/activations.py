"""Layers without parameters: activations, reshape, flatten, cast, dropout."""

from jax import Array
from jax.typing import DTypeLike

from backhand import ops
from backhand.arrays import flag
from backhand.ops.dropout import check_rate
from backhand.protocol import Layer, Training, as_layer, check_key, layer, need_floating
from backhand.visit import Params, Residuals


def relu() -> Layer:
    """max(x, 0).

    Example:
        >>> import jax.numpy as jnp
        >>> relu()((), jnp.array([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """
    return as_layer(ops.relu)


def leaky_relu(negative_slope: float = 0.01) -> Layer:
    """x where x >= 0, else negative_slope x.

    Example:
        >>> import jax.numpy as jnp
        >>> leaky_relu(0.5)((), jnp.array([-1.0, 2.0])).tolist()
        [-0.5, 2.0]
    """
    return as_layer(ops.leaky_relu, negative_slope=negative_slope)


def sigmoid() -> Layer:
    """1 / (1 + exp(-x)).

    Example:
        >>> import jax.numpy as jnp
        >>> sigmoid()((), jnp.array([0.0])).tolist()
        [0.5]
    """
    return as_layer(ops.sigmoid)


def tanh() -> Layer:
    """tanh(x).

    Example:
        >>> import jax.numpy as jnp
        >>> tanh()((), jnp.array([0.0])).tolist()
        [0.0]
    """
    return as_layer(ops.tanh)


def gelu(approximate: bool = False) -> Layer:
    """x Phi(x): exact by erf, or approximate by tanh.

    Example:
        >>> import jax.numpy as jnp
        >>> gelu()((), jnp.array([0.0, 1.0])).tolist()
        [0.0, 0.8413]
    """
    return as_layer(ops.gelu, approximate=approximate)


def silu() -> Layer:
    """x sigmoid(x).

    Example:
        >>> import jax.numpy as jnp
        >>> silu()((), jnp.array([0.0, 1.0])).tolist()
        [0.0, 0.7311]
    """
    return as_layer(ops.silu)


def softplus() -> Layer:
    """log(1 + exp(x)).

    Example:
        >>> import jax.numpy as jnp
        >>> softplus()((), jnp.array([0.0])).tolist()
        [0.6931]
    """
    return as_layer(ops.softplus)


def elu(alpha: float = 1.0) -> Layer:
    """x where x > 0, else alpha (exp(x) - 1).

    Example:
        >>> import jax.numpy as jnp
        >>> elu(2.0)((), jnp.array([-50.0, 1.0])).tolist()
        [-2.0, 1.0]
    """
    return as_layer(ops.elu, alpha=alpha)


def softmax(axis: int = -1) -> Layer:
    """Probabilities along an axis. A classifier ends in logits: its loss has the softmax in it.

    Example:
        >>> import jax.numpy as jnp
        >>> softmax()((), jnp.array([1.0, 1.0])).tolist()
        [0.5, 0.5]
    """
    return as_layer(ops.softmax, axis=axis)


def reshape(*shape: int) -> Layer:
    """(B, *features) as (B, *shape).

    Example:
        >>> import jax.numpy as jnp
        >>> reshape(2, -1)((), jnp.ones((3, 8))).shape
        (3, 2, 4)
    """
    return as_layer(ops.reshape, shape=shape)


def flatten() -> Layer:
    """(B, ...) as (B, D).

    Example:
        >>> import jax.numpy as jnp
        >>> flatten()((), jnp.ones((3, 2, 4))).shape
        (3, 8)
    """
    return as_layer(ops.flatten)


def cast(dtype: DTypeLike) -> Layer:
    """x in another floating-point dtype, in which the layers after it then compute.

    Example:
        >>> import jax.numpy as jnp
        >>> cast(jnp.bfloat16)((), jnp.ones(2)).dtype
        dtype(bfloat16)
    """
    return as_layer(ops.cast, dtype=dtype)


def dropout(rate: float) -> Layer:
    """While training, drops a share `rate` of the inputs; else passes them on.

    Uses `training`, and a `key` while training; stores no mask.

    Raises:
        ValueError: for a rate outside [0, 1), or, when run, for a missing key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> y = dropout(0.5)((), jnp.ones(64), training=True, key=jax.random.key(0))
        >>> sorted(set(y.tolist()))
        [0.0, 2.0]
    """
    check_rate(rate)

    def dropped(x: Array, training: Training, key: Array | None) -> Array:
        need_floating("dropout", x)
        if training != "frozen" and not flag("dropout's training", training):
            return x
        if key is None:
            raise ValueError(
                "dropout needs a key while training: pass key=jax.random.key(seed); a training "
                "step has it from bh.train_state(params, optimizer, key=...)"
            )
        check_key(key)
        return ops.dropout.forward(x, key, rate=rate)[0]

    def forward(
        params: Params, x: Array, *, training: Training, key: Array | None = None
    ) -> tuple[Array, Residuals]:
        return dropped(x, training, key), ()

    def rule(
        params: Params,
        residuals: Residuals,
        dy: Array,
        *,
        training: Training,
        key: Array | None = None,
    ) -> tuple[Params, Array]:
        return (), dropped(dy, training, key)

    return layer("dropout", lambda key, x: (), forward, rule)
