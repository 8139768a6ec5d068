"""Rows of a table by id, and the same table as an output layer."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer, normal
from jax.typing import DTypeLike
from jaxtyping import Float, Integer

from backhand import ops
from backhand.arrays import accumulation_dtype, whole_number
from backhand.contributions import Outer, Rows
from backhand.ops.linear import linear_dx
from backhand.protocol import Layer, layer, need_floating
from backhand.visit import Params, PyTree


def embedding(
    vocabulary: int,
    features: int,
    *,
    dtype: DTypeLike | None = None,
    initializer: Initializer | None = None,
) -> Layer:
    """y = table[ids], from integers (...) to (..., D).

    Parameters: table (V, D), float32. Ids have no error: its dx is None.

    Args:
        vocabulary: V.
        features: D.
        dtype: of y, in which the layers after it then compute, such as `jnp.bfloat16`; the
            gradient of the table is summed in float32. None for that of the table.
        initializer: of the table; normal with standard deviation 0.02 by default.

    Raises:
        ValueError: if V or D < 1; when run, for an id that is known and not in [-V, V).
        TypeError: if `dtype` is not floating point; when run, if ids are not integers.

    Example:
        >>> layer = embedding(100, 8)
        >>> layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 5), "int32"))["table"].shape
        (100, 8)
    """
    make = _checked("embedding", vocabulary, features, initializer)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"embedding needs a floating-point dtype, got {jnp.dtype(dtype)}")

    def init(key: Array, ids: jax.ShapeDtypeStruct) -> Params:
        return {"table": make(key, (vocabulary, features), jnp.float32)}

    def forward(params: Params, ids: Integer[Array, "..."]) -> tuple[Array, Array]:
        y = ops.embedding.forward(params["table"], ids)[0]
        return y if dtype is None else ops.cast.forward(y, dtype=dtype)[0], ids

    def rule(params: Params, ids: Array, dy: Array) -> tuple[PyTree, None]:
        return {"table": Rows(ids, dy)}, None

    return layer("embedding", init, forward, rule)


def unembedding(vocabulary: int, *, initializer: Initializer | None = None) -> Layer:
    """logits = x table^T, from (..., D) to (..., V): the output layer that can be tied.

    Parameters: table (V, D). With `share` it is the embedding's:
    `share(chain(tokens=embedding(V, D), ..., logits=unembedding(V)),
    {"logits/table": "tokens/table"})`.

    Args:
        vocabulary: V.
        initializer: of the table; normal with standard deviation 0.02 by default.

    Raises:
        ValueError: if V < 1.
        TypeError: when run, if x is not floating point.

    Example:
        >>> layer = unembedding(100)
        >>> layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 5, 8), "float32"))["table"].shape
        (100, 8)

    References:
        Press and Wolf, "Using the output embedding to improve language models", 2016.
    """
    make = _checked("unembedding", vocabulary, 1, initializer)

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        need_floating("unembedding", x)
        return {"table": make(key, (vocabulary, x.shape[-1]), accumulation_dtype(x.dtype))}

    def forward(params: Params, x: Float[Array, "... D"]) -> tuple[Array, Array]:
        return ops.linear.forward(x, params["table"].T)[0], x

    def rule(params: Params, x: Array, dy: Array) -> tuple[PyTree, Array]:
        return {"table": Outer(dy, x)}, linear_dx(dy, params["table"].T, x)

    return layer("unembedding", init, forward, rule)


def _checked(
    name: str, vocabulary: int, features: int, initializer: Initializer | None
) -> Initializer:
    sizes = {"vocabulary": vocabulary, "features": features}
    if min(whole_number(f"{name}'s {what}", size) for what, size in sizes.items()) < 1:
        raise ValueError(f"{name} needs at least 1 row and 1 feature, got {vocabulary}, {features}")
    return normal(0.02) if initializer is None else initializer
