"""The functional API: functions of arrays with a hand-written backward.

Each is an `Op`: call it and `jax.grad` runs the hand-written backward; `op.forward` and
`op.backward` are the two passes themselves.
"""

from backhand.ops.activations import (
    elu,
    gelu,
    leaky_relu,
    relu,
    sigmoid,
    silu,
    softmax,
    softplus,
    tanh,
)
from backhand.ops.dropout import dropout
from backhand.ops.embedding import embedding
from backhand.ops.linear import linear
from backhand.ops.normalization import batch_norm, layer_norm
from backhand.ops.shape import cast, flatten, reshape

__all__ = [
    "batch_norm",
    "cast",
    "dropout",
    "elu",
    "embedding",
    "flatten",
    "gelu",
    "layer_norm",
    "leaky_relu",
    "linear",
    "relu",
    "reshape",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
]
