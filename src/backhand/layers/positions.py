"""Where a token is, told by what is added to it."""

import jax
from jax import Array
from jax.nn.initializers import Initializer, normal
from jaxtyping import Float

from backhand import ops
from backhand.arrays import accumulation_dtype, explicit_sharding, whole_number
from backhand.contributions import Total
from backhand.protocol import Layer, as_layer, layer, need_floating
from backhand.visit import Params, PyTree


def positional_embedding(length: int, *, initializer: Initializer | None = None) -> Layer:
    """y[b, t] = x[b, t] + table[t]: a learned vector for each position.

    dtable[t] = sum_b dy[b, t], and dx = dy. Positions from T on are not read and get no blame.

    Parameters: table (length, D), float32, or float64 for float64 inputs.

    Args:
        length: the most tokens that there can be.
        initializer: of the table; normal with standard deviation 0.02 by default.

    Raises:
        ValueError: if length < 1; when run, if x is not (B, T, D) with T up to length.
        TypeError: when run, if x is not floating point.

    Example:
        >>> layer = positional_embedding(16)
        >>> layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 5, 8), "float32"))["table"].shape
        (16, 8)
    """
    if whole_number("length", length) < 1:
        raise ValueError(f"positional_embedding needs a length of at least 1, got {length}")
    make = normal(0.02) if initializer is None else initializer

    def check(x: Array | jax.ShapeDtypeStruct) -> None:
        need_floating("positional_embedding", x)
        if len(x.shape) != 3 or x.shape[1] > length:
            raise ValueError(
                f"positional_embedding needs x of shape (B, T, D) with at most {length} tokens, "
                f"got {x.shape}"
            )

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        check(x)
        return {"table": make(key, (length, x.shape[-1]), accumulation_dtype(x.dtype))}

    def forward(params: Params, x: Float[Array, "B T D"]) -> tuple[Array, tuple[()]]:
        check(x)
        table = params["table"]
        sharding = explicit_sharding(x)
        if sharding is not None:
            table = jax.sharding.reshard(table, sharding.update(spec=(None, sharding.spec[2])))
        return x + table[None, : x.shape[1]].astype(x.dtype), ()

    def rule(params: Params, residuals: tuple[()], dy: Array) -> tuple[PyTree, Array]:
        return {"table": Total(dy, rank=2, unread=length - dy.shape[1])}, dy

    return layer("positional_embedding", init, forward, rule)


def sinusoidal(*, base: float = 10000.0) -> Layer:
    """x plus sines and cosines of its positions, which are not learned.

    Args:
        base: the wavelengths grow from 2 pi to 2 pi base.

    Example:
        >>> import jax.numpy as jnp
        >>> sinusoidal()((), jnp.zeros((1, 2, 2))).tolist()
        [[[0.0, 1.0], [0.841471, 0.540302]]]
    """
    return as_layer(ops.sinusoidal, base=base)
