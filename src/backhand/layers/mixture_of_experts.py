"""A mixture of experts: many feed-forward blocks, of which each token uses a few."""

import jax
from jax import Array
from jax.nn.initializers import Initializer, lecun_normal
from jaxtyping import Float

from backhand import ops
from backhand.arrays import accumulation_dtype, whole_number
from backhand.ops.gated import checked_activation
from backhand.ops.mixture import check_routing, check_tokens, mixture_errors
from backhand.protocol import Layer, Op, layer
from backhand.visit import Params, PyTree

NAME = "mixture_of_experts"


def mixture_of_experts(
    experts: int,
    hidden: int,
    top_k: int = 2,
    capacity_factor: float | None = 1.25,
    *,
    activation: str | Op = "gelu",
    gated: bool = False,
    initializer: Initializer | None = None,
) -> Layer:
    """y = sum_k w_k expert_k(x) over the experts that a router chooses, from (B, T, D) to a pair.

    Gives (y, balance): y as x, and for each example the balance (B,) of its experts, 1 where they
    share its tokens evenly and E where one has all. What balances them is a share of it in the
    loss: beside a classifier's logits, `bh.losses.with_balance(loss, 0.01)` is such a loss, and
    `tally` and `skip` carry balances through a stack. Derivations, and which tokens are dropped,
    are with `backhand.ops.mixture_of_experts`. Everything is counted in one example at a time, so
    that gradients are exact over micro-batches.

    Parameters: router (D, E), w_in (E, D, H), w_out (E, H, D), and w_gate (E, D, H) where gated; no
    bias. Uses `mask` (B, T), which tokens there are, where it is given.

    Args:
        experts: E.
        hidden: H, of each expert.
        top_k: how many experts a token uses.
        capacity_factor: an expert takes its even share of an example's tokens times this, and drops
            the rest, which adds nothing to y; None drops nothing.
        activation: of the experts, as `mlp` takes it.
        gated: whether experts are gated, (act(x w_gate) (x w_in)) w_out.
        initializer: of each matrix, `(key, shape, dtype) -> array`; LeCun's normal by default.

    Raises:
        ValueError: for sizes below 1, more choices than experts, a capacity factor that is not
            positive, another activation; when run, for x that is not of rank 3, or a mask that does
            not fit it.
        TypeError: when run, if x is not floating point, or the mask not boolean.

    Example:
        >>> layer = mixture_of_experts(4, 32, gated=True, activation="silu")
        >>> x = jax.ShapeDtypeStruct((2, 16, 8), "float32")
        >>> params = layer.init(jax.random.key(0), x)
        >>> {name: leaf.shape for name, leaf in params.items()}
        {'router': (8, 4), 'w_in': (4, 8, 32), 'w_out': (4, 32, 8), 'w_gate': (4, 8, 32)}

    References:
        Shazeer et al., "Outrageously large neural networks: the sparsely-gated mixture-of-experts
        layer", 2017; Fedus, Zoph and Shazeer, "Switch transformers", 2021.
    """
    for name, size in (("experts", experts), ("hidden", hidden)):
        if whole_number(f"{NAME}'s {name}", size) < 1:
            raise ValueError(f"{NAME} needs at least 1 for {name}, got {size}")
    check_routing(experts, top_k, capacity_factor)
    act, make = checked_activation(NAME, activation), initializer or lecun_normal()
    op = ops.mixture_of_experts.bind(top_k=top_k, capacity_factor=capacity_factor, activation=act)
    names = ("router", "w_in", "w_out", *(["w_gate"] if gated else []))

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        check_tokens(x)
        width, dtype = x.shape[-1], accumulation_dtype(x.dtype)
        shapes = {"w_in": (width, hidden), "w_out": (hidden, width), "w_gate": (width, hidden)}
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        params = {"router": make(keys["router"], (width, experts), dtype)}
        for name in names[1:]:
            each = jax.random.split(keys[name], experts)
            params[name] = jax.vmap(lambda key, s=shapes[name]: make(key, s, dtype))(each)
        return params

    def forward(
        params: Params, x: Float[Array, "B T D"], *, mask: Array | None = None
    ) -> tuple[PyTree, PyTree]:
        own = [params.get(name) for name in ("router", "w_in", "w_out", "w_gate")]
        y, residuals = op.forward(x, *own, mask)
        return y, residuals._replace(**dict.fromkeys(names))

    def rule(params: Params, residuals: PyTree, dy: PyTree) -> tuple[PyTree, Array]:
        errors = mixture_errors(residuals._replace(**params), dy, act)
        return {name: getattr(errors, name) for name in names}, errors.dx

    return layer(NAME, init, forward, rule)
