"""Embedding: rows of a table, by id.

    y[n] = table[ids[n]]        dtable[v] = sum of dy[n] over the n with ids[n] = v

A row is blamed for every place that read it, and rows that nobody read get none.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from backhand.arrays import explicit_sharding, need_integers
from backhand.bounds import need_within
from backhand.contributions import Rows, total
from backhand.protocol import Op

Residuals = tuple[Float[Array, "V D"], Integer[Array, "..."]]


def embedding_forward(
    table: Float[Array, "V D"], ids: Integer[Array, "..."]
) -> tuple[Float[Array, "... D"], Residuals]:
    """The rows of a table.

    Args:
        table: (V, D).
        ids: integers (...) in [-V, V), negative ones counted from the end. Known ones are checked;
            one outside that only the device knows gives a row of NaN, so that it is noticed.

    Returns:
        y (..., D), in the dtype of the table.

    Raises:
        TypeError: if ids are not integers.
        ValueError: if the table is not of rank 2, or an id that is known is outside.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> bh.ops.embedding(jnp.eye(3), jnp.array([2, 0])).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    need_integers("embedding", "ids", ids)
    if table.ndim != 2:
        raise ValueError(f"embedding needs a table of shape (V, D), got {table.shape}")
    rows = table.shape[0]
    need_within("embedding needs ids", ids, -rows, rows - 1, f"for a table of {rows} rows")
    return take_rows(table, ids), (table, ids)


def take_rows(table: Float[Array, "V D"], ids: Integer[Array, "..."]) -> Float[Array, "... D"]:
    """`table[ids]`, NaN outside; under an explicit mesh sharded as the ids are."""
    sharding = explicit_sharding(ids)
    if sharding is not None:
        sharding = sharding.update(spec=(*sharding.spec, None))
    return jnp.asarray(table).at[ids].get(mode="fill", fill_value=jnp.nan, out_sharding=sharding)


def embedding_backward(
    residuals: Residuals, dy: Float[Array, "... D"]
) -> tuple[Float[Array, "V D"], None]:
    table, ids = residuals
    return total(Rows(ids, dy), table), None


def embedding_reference(table: Array, ids: Array) -> Array:
    return jnp.take(table, ids, axis=0)


embedding = Op("embedding", embedding_forward, embedding_backward, embedding_reference)
