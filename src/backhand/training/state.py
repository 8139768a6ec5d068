"""Everything that a training run carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from backhand.contributions import is_running
from backhand.visit import Params, PyTree


class TrainState(NamedTuple):
    """A pytree: what `train_step` takes and gives.

    Attributes:
        step: how many updates were made, int32 ().
        params: the parameters, running statistics included.
        opt_state: the optimizer's.
        key: the key of the run; step n uses `jax.random.fold_in(key, n)`. None without one.
    """

    step: Array
    params: Params
    opt_state: PyTree
    key: Array | None


def train_state(
    params: Params, optimizer: optax.GradientTransformation, *, key: Array | None = None
) -> TrainState:
    """The state before the first step, on copies of `params` and `key`: steps donate their state.

    Args:
        params: as `objective.init` gives them.
        optimizer: any Optax update rule.
        key: for models that use one while training.

    Raises:
        TypeError: if the optimizer is not an `optax.GradientTransformation`.
    """
    params, key = jax.tree.map(jnp.copy, (params, key))
    opt_state = learning(optimizer, params).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, key)


def learning(
    optimizer: optax.GradientTransformation, params: Params
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, kept from running statistics: weight decay would shrink a variance.

    Raises:
        TypeError: if it is not an `optax.GradientTransformation`.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            "the optimizer must be an optax.GradientTransformation, such as optax.adamw(1e-3); got "
            f"{optimizer!r}"
        )
    mask = jax.tree.map(_is_learned, params, is_leaf=is_running)
    if not all(jax.tree.leaves(mask)):
        optimizer = optax.masked(optimizer, mask)
    return optax.with_extra_args_support(optimizer)


def _is_learned(leaf: Any) -> Any:
    """False throughout a running statistic, True for a parameter."""
    return jax.tree.map(lambda _: False, leaf) if is_running(leaf) else True
