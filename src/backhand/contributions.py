"""What one use of a parameter adds to its gradient, before it is summed.

A layer's rule may leave the cotangent of a parameter as the factors that make it: what came in,
times the error going out. Different readers then want different things of the same factors:

    gradient             G   = sum_b g_b            `total`
    per-example norms    n_b = <g_b, g_b>           `inner_products`

Every array of a contribution has the batch as its first axis B; axes between it and the features
(`...`, time for instance) are summed inside an example. Under `repeat` all of it is stacked once
more, on a leading depth axis, as the parameter is; the rank of the parameter tells.

    Outer(x, dy)    g_b = sum_t x[b, t] (outer) dy[b, t]       a weight
    Total(dy)       g_b = sum_t dy[b, t]                       a bias, a scale
    Rows(ids, dy)   g_b = sum_t onehot(ids[b, t]) (outer) dy[b, t]    rows of a table
    Windows(x, dy)  g_b = sum_p patch(x[b], p) (outer) dy[b, p]       a convolution's weight
    Many(parts)     g_b = sum of the parts' g_b                a parameter used more than once
    Moments(...)    no gradient: what a running statistic saw
    None            no gradient: frozen
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from backhand.arrays import (
    accumulation_dtype,
    explicit_sharding,
    is_floating,
    like_primal,
    one_by_one,
    outer,
    sum_leading,
    upcast,
    zeros_like,
)

if TYPE_CHECKING:
    Leaf: TypeAlias = Array
else:
    Leaf = Any  # a record goes through JAX with shapes, shardings or flags for its arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outer:
    """Uses of a weight (I, O): `x` (B, ..., I) came in, the error `dy` (B, ..., O) went out."""

    x: Leaf
    dy: Leaf

    def sum(self, param: Array) -> Array:
        """The gradient (I, O), accumulated in at least float32."""
        return outer(self.x, self.dy, _accumulator(param, self.dy))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Total:
    """Uses of a parameter that is added or scales: `dy` (B, ..., *parameter's shape).

    `rank` is the rank of the parameter itself, 1 for a bias. `unread` is how many places at the end
    of its first axis were not read: dy is shorter by them, their gradient 0. They are filled in
    after the sum: a learned table of positions of which half is read took 1.8 times as long where
    dy was padded for every example.
    """

    dy: Leaf
    rank: int = dataclasses.field(default=1, metadata={"static": True})
    unread: int = dataclasses.field(default=0, metadata={"static": True})

    def sum(self, param: Array) -> Array:
        """The gradient, accumulated in at least float32."""
        dtype = accumulation_dtype(param.dtype, self.dy.dtype)
        return self.filled(sum_leading(self.dy, self.rank, dtype))

    def filled(self, summed: Array) -> Array:
        """(..., *parameter's shape): a sum with zeros where nothing was read."""
        if self.unread == 0:
            return summed
        widths = [(0, 0)] * summed.ndim
        widths[summed.ndim - self.rank] = (0, self.unread)
        return jnp.pad(summed, widths)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Uses of rows of a table (V, D): integer `ids` (B, ...) and the error `dy` (B, ..., D)."""

    ids: Leaf
    dy: Leaf

    def sum(self, param: Array) -> Array:
        """The gradient (V, D), accumulated in at least float32."""
        table = _accumulator(param, self.dy)
        return table.at[self.ids].add(
            self.dy.astype(table.dtype), out_sharding=explicit_sharding(param)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Windows:
    """Uses of a convolution's weight (*K, I / groups, O) at every place of its window.

    `x` (B, *S, I) came in, the error `dy` (B, *P, O) went out; in a transposed convolution they
    change places. `product` says where the windows lie, which is hashable: called with x, dy and
    the kernel's sizes it gives the gradient, and `rank` is the number of spatial axes.
    """

    x: Leaf
    dy: Leaf
    product: Any = dataclasses.field(metadata={"static": True})

    def sum(self, param: Array) -> Array:
        """The gradient, accumulated in at least float32; leading axes are examples all."""
        example = -(self.product.rank + 1)
        x, dy = (leaf.reshape(-1, *leaf.shape[example:]) for leaf in (self.x, self.dy))
        return self.product(x, dy, param.shape[:-2])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Many:
    """A parameter used more than once: the contributions of all its uses, one of them not None."""

    parts: tuple["Contribution", ...]

    def sum(self, param: Array) -> Array:
        """The sum of the parts' gradients, accumulated in at least float32."""
        sums = [_sum(part, param) for part in self.parts if part is not None]
        same = [like_primal(each, _accumulator(param, each)) for each in sums]
        return sum(same[1:], start=same[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Running:
    """A running mean and variance, kept beside the parameters but not learned by gradient.

    `mean` and `var` have one shape (C,); `decay` is the share of the old value that a step keeps.
    They are arrays, or what stands for them in another tree of parameters: shapes, flags.
    """

    mean: Any
    var: Any
    decay: float = dataclasses.field(default=0.99, metadata={"static": True})

    def merge(self, seen: "Moments") -> "Running":
        """The statistics after a step that saw `seen`; unchanged where it saw nothing."""
        count = jnp.maximum(seen.count, 1)[..., None]
        shift = seen.total / count
        var = seen.square / count - shift**2
        keep = jnp.where(seen.count > 0, self.decay, 1.0)[..., None]
        mean = self.mean.astype(shift.dtype) + (1 - keep) * shift
        var = keep * self.var.astype(shift.dtype) + (1 - keep) * jnp.maximum(var, 0)
        return Running(mean.astype(self.mean.dtype), var.astype(self.var.dtype), self.decay)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """What a running statistic saw of one batch; adds up exactly over micro-batches.

    `count` (), and the sum `total` (C,) and sum of squares `square` (C,) of x - running mean. Once
    that mean is near, the shift keeps the variance from cancelling in float32. Before, with a mean
    many times the spread, it does not: from a running mean of 0, at decay 0.9, of values of mean
    1e4 and variance 1 the running variance is 0.90, 0.59 and 0.76 after 1, 5 and 10 steps, where it
    should be 1.00, 0.98 and 0.99; at mean 1e3 it is off by 0.3%, at 100 not.
    """

    count: Leaf
    total: Leaf
    square: Leaf


Contribution: TypeAlias = "Outer | Total | Rows | Windows | Many | Moments | Array | None"
KINDS = (Outer, Total, Rows, Windows, Many, Moments)


def is_contribution(node: Any) -> bool:
    """Whether `node` is a contribution as a whole, for `jax.tree.map(..., is_leaf=)`."""
    return node is None or isinstance(node, KINDS)


def is_running(node: Any) -> bool:
    """Whether `node` is a running statistic as a whole, for `jax.tree.map(..., is_leaf=)`."""
    return isinstance(node, Running)


def map_owners(f: Callable[..., Any], params: Any, *contributions: Any) -> Any:
    """`f(param, contribution, ...)` at every parameter; a `Running` counts as one."""
    structure: Any
    leaves, structure = jax.tree.flatten(params, is_leaf=is_running)
    columns = [structure.flatten_up_to(tree) for tree in contributions]
    return structure.unflatten([f(*row) for row in zip(leaves, *columns, strict=True)])


def total(contribution: Contribution, param: Any) -> Any:
    """The gradient that a contribution sums to, in the shape, dtype and sharding of `param`.

    A frozen parameter (None) and a running statistic (`Moments`) have a gradient of zero; integers
    have none.

    Raises:
        ValueError: if the sum has another shape than `param`.
    """
    if isinstance(param, Running):
        return jax.tree.map(lambda leaf: zeros_like(leaf, leaf.dtype), param)
    if not is_floating(param):
        return None
    if contribution is None or isinstance(contribution, Moments):
        return zeros_like(param, param.dtype)
    if isinstance(contribution, KINDS):
        return like_primal(_stacked(_sum, contribution, param)(contribution, param), param)
    if contribution.shape != param.shape:
        raise ValueError(
            f"a gradient has the shape of its parameter {param.shape}, got {contribution.shape}; "
            "sum over the batch, or give the factors: Outer, Total, Rows or Windows"
        )
    return like_primal(contribution, param)


def scaled(contribution: Contribution, factors: Array, param: Array) -> Contribution:
    """The contribution with each example's part multiplied by its factor (B,)."""

    def scale(c: Contribution, param: Array) -> Contribution:
        match c:
            case Many(parts):
                return Many(tuple(scale(part, param) for part in parts))
            case Outer() | Total() | Rows() | Windows():
                per_example = factors.astype(c.dy.dtype).reshape(-1, *[1] * (c.dy.ndim - 1))
                return dataclasses.replace(c, dy=c.dy * per_example)
            case _:
                raise TypeError(f"only a contribution can be scaled, got {type(c).__name__}")

    return _stacked(scale, contribution, param)(contribution, param)


def has_examples(contribution: Contribution) -> bool:
    """Whether a contribution has a gradient: not frozen, and not a running statistic."""
    return not (contribution is None or isinstance(contribution, Moments))


def inner_products(a: Contribution, b: Contribution, param: Array) -> Array:
    """Per-example inner products <g_b, h_b> of two contributions to one parameter: (B,).

    With `a is b`, the square norms of the per-example gradients. Where neither factor has axes
    between batch and features, in closed form: |x|^2 |dy|^2 for a weight. Rows are compared by id.
    Otherwise by a scan that holds one example's gradient at a time, cheaper than the Gram form over
    time at every shape measured.

    Raises:
        TypeError: for a plain array, which is summed over the batch already, or running statistics.
    """
    for part in (*uses_of(a), *uses_of(b)):
        if not isinstance(part, Outer | Total | Rows | Windows):
            raise TypeError(
                "per-example inner products need contributions with a batch axis (Outer, Total, "
                f"Rows or Windows), got {_kind(part)}"
            )
    if a is b:
        return _stacked(lambda a, param: _inner(a, a, param), a, param)(a, param)
    return _stacked(_inner, a, param)(a, b, param)


def _kind(part: Contribution) -> str:
    return type(part).__name__ if isinstance(part, KINDS) else "an array, summed over the batch"


def _inner(a: Contribution, b: Contribution, param: Array) -> Array:
    pairs = [_closed_form(one, other, param) for one in uses_of(a) for other in uses_of(b)]
    known = [pair for pair in pairs if pair is not None]
    if len(known) == len(pairs):
        return sum(known[1:], start=known[0])

    def example(pair: tuple[Any, Any]) -> Array:
        one = [jax.tree.map(lambda leaf: leaf[None], part) for part in pair]
        g = one[0].sum(param)
        return jnp.vdot(g, g if a is b else one[1].sum(param))

    return one_by_one(example, (a, b))


def _closed_form(a: Contribution, b: Contribution, param: Array) -> Array | None:
    """Per-example inner products (B,) without any example's gradient; None where there is none."""
    match a, b:
        case Total(), Total():
            return _dot(_per_example(a), _per_example(b))
        case Outer(), Outer() if a.x.ndim == b.x.ndim == 2:
            return _dot(a.x, b.x) * _dot(a.dy, b.dy)
        case Rows(), Rows():
            rows = param.shape[0]  # negative ids count from the end
            same = (_flat(a.ids) % rows)[:, :, None] == (_flat(b.ids) % rows)[:, None, :]
            gram = jnp.einsum("btd,bsd->bts", _flat(a.dy, 1), _flat(b.dy, 1))
            return jnp.sum(gram, where=same, axis=(1, 2))
        case _:
            return None


def both(a: Contribution, b: Contribution) -> Contribution:
    """The contributions of two uses of one parameter, as one."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, Moments) and isinstance(b, Moments):
        return jax.tree.map(jnp.add, a, b)
    return Many((*_parts(a), *_parts(b)))


def _parts(contribution: Contribution) -> tuple[Contribution, ...]:
    return contribution.parts if isinstance(contribution, Many) else (contribution,)


def uses_of(contribution: Contribution) -> tuple[Contribution, ...]:
    """The uses that a contribution is the sum of."""
    if isinstance(contribution, Many):
        return tuple(part for part in contribution.parts if part is not None)
    return (contribution,)


def _stacked(f: Callable[..., Any], contribution: Contribution, param: Array) -> Callable[..., Any]:
    """`f` mapped over the depth axes that `repeat` put in front of a parameter."""
    for _ in range(param.ndim - rank_of(contribution, param)):
        f = jax.vmap(f)
    return f


def rank_of(contribution: Contribution, param: Array) -> int:
    """The rank of the parameter that a contribution belongs to, without depth axes."""
    match contribution:
        case Many(parts):
            return min(rank_of(part, param) for part in parts)
        case Outer() | Rows():
            return 2
        case Windows(product=product):
            return product.rank + 2
        case Total(rank=rank):
            return rank
        case _:
            return param.ndim


def _sum(contribution: Any, param: Array) -> Array:
    """The sum over the batch; a plain array is summed already."""
    return contribution.sum(param) if is_contribution(contribution) else contribution


def _accumulator(param: Array, dy: Array) -> Array:
    """Zeros like `param` in the dtype that its gradient is summed in."""
    return zeros_like(param, accumulation_dtype(param.dtype, dy.dtype))


def _per_example(contribution: Total) -> Array:
    """(B, *parameter's shape): the sum inside each example."""
    dy = upcast(contribution.dy)
    return contribution.filled(jnp.sum(dy, tuple(range(1, dy.ndim - contribution.rank))))


def _flat(x: Array, features: int = 0) -> Array:
    """(B, T) or (B, T, D): the axes inside an example as one."""
    x = x if features == 0 else upcast(x)
    return x.reshape(x.shape[0], -1, *x.shape[x.ndim - features :])


def _dot(a: Array, b: Array) -> Array:
    """(B,): inner products of the rows, in at least float32."""
    return jnp.sum(upcast(a) * upcast(b), tuple(range(1, a.ndim)))
