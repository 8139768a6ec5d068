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
from backhand.ops.attention import attention
from backhand.ops.convolution import convolution
from backhand.ops.dropout import dropout
from backhand.ops.elman import elman
from backhand.ops.embedding import embedding
from backhand.ops.gated import gated, geglu, glu, swiglu
from backhand.ops.global_pooling import (
    adaptive_average_pool,
    global_average_pool,
    global_max_pool,
)
from backhand.ops.gru import gru
from backhand.ops.linear import linear
from backhand.ops.linear_recurrence import linear_recurrence
from backhand.ops.lstm import lstm
from backhand.ops.mixture import mixture_of_experts
from backhand.ops.normalization import batch_norm, group_norm, instance_norm, layer_norm
from backhand.ops.pooling import average_pool, max_pool
from backhand.ops.positions import sinusoidal
from backhand.ops.rms_norm import rms_norm
from backhand.ops.rotary import rotary
from backhand.ops.shape import cast, flatten, reshape
from backhand.ops.transposed_convolution import transposed_convolution
from backhand.ops.weight_standardization import weight_standardization

__all__ = [
    "adaptive_average_pool",
    "attention",
    "average_pool",
    "batch_norm",
    "cast",
    "convolution",
    "dropout",
    "elman",
    "elu",
    "embedding",
    "flatten",
    "gated",
    "geglu",
    "gelu",
    "global_average_pool",
    "global_max_pool",
    "glu",
    "group_norm",
    "gru",
    "instance_norm",
    "layer_norm",
    "leaky_relu",
    "linear",
    "linear_recurrence",
    "lstm",
    "max_pool",
    "mixture_of_experts",
    "relu",
    "reshape",
    "rms_norm",
    "rotary",
    "sigmoid",
    "silu",
    "sinusoidal",
    "softmax",
    "softplus",
    "swiglu",
    "tanh",
    "transposed_convolution",
    "weight_standardization",
]
