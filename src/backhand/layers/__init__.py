"""Layers: ops with parameters of their own."""

from backhand.layers.activations import (
    cast,
    dropout,
    elu,
    flatten,
    gelu,
    leaky_relu,
    relu,
    reshape,
    sigmoid,
    silu,
    softmax,
    softplus,
    tanh,
)
from backhand.layers.dense import dense
from backhand.layers.embedding import embedding, unembedding
from backhand.layers.normalization import batch_norm, layer_norm

__all__ = [
    "batch_norm",
    "cast",
    "dense",
    "dropout",
    "elu",
    "embedding",
    "flatten",
    "gelu",
    "layer_norm",
    "leaky_relu",
    "relu",
    "reshape",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
    "unembedding",
]
