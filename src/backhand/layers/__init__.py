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
from backhand.layers.attention import multi_head_attention
from backhand.layers.convolution import conv, conv_transpose, depthwise_conv
from backhand.layers.dense import dense
from backhand.layers.diagonal_ssm import diagonal_ssm
from backhand.layers.embedding import embedding, unembedding
from backhand.layers.feed_forward import gated_mlp, mlp
from backhand.layers.mixture_of_experts import mixture_of_experts
from backhand.layers.normalization import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)
from backhand.layers.pooling import (
    adaptive_average_pool,
    average_pool,
    global_average_pool,
    global_max_pool,
    max_pool,
)
from backhand.layers.positions import positional_embedding, sinusoidal
from backhand.layers.recurrent import gru, lstm, rnn
from backhand.layers.recurrent_stacks import bidirectional, stacked
from backhand.layers.weight_standardization import standardized

__all__ = [
    "adaptive_average_pool",
    "average_pool",
    "batch_norm",
    "bidirectional",
    "cast",
    "conv",
    "conv_transpose",
    "dense",
    "depthwise_conv",
    "diagonal_ssm",
    "dropout",
    "elu",
    "embedding",
    "flatten",
    "gated_mlp",
    "gelu",
    "global_average_pool",
    "global_max_pool",
    "group_norm",
    "gru",
    "instance_norm",
    "layer_norm",
    "leaky_relu",
    "lstm",
    "max_pool",
    "mixture_of_experts",
    "mlp",
    "multi_head_attention",
    "positional_embedding",
    "relu",
    "reshape",
    "rms_norm",
    "rnn",
    "sigmoid",
    "silu",
    "sinusoidal",
    "softmax",
    "softplus",
    "stacked",
    "standardized",
    "tanh",
    "unembedding",
]
