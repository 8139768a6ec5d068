"""PyTorch's forward and reverse of an op, where PyTorch is installed and has it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.measure import cores

Prepare = Callable[..., Callable[[], Any]]
"""From dy and the arguments, a function that runs PyTorch's forward and reverse."""


class Peer(NamedTuple):
    """One of PyTorch's forms, ready to run."""

    layout: str
    run: Callable[[], Any]


def torch_op(function: Callable[..., Any], arrange: Callable[..., Any] | None = None) -> Prepare:
    """PyTorch's forward and reverse of a function of tensors.

    Args:
        function: `(torch.nn.functional, *tensors) -> y`, of the leaves of the arguments in order.
        arrange: `(dy, *tensors)` to the same in PyTorch's layout; none of it is timed.
    """

    def prepare(dy: Any, *arguments: Any) -> Callable[[], Any]:
        import torch

        torch.set_num_threads(cores())
        tensors = [tensor(leaf) for leaf in (jax.tree.leaves(dy)[0], *jax.tree.leaves(arguments))]
        error, *own = tensors if arrange is None else arrange(*tensors)
        leaves = [each.detach().requires_grad_() for each in own if each.is_floating_point()]
        known = iter(leaves)
        given = [next(known) if each.is_floating_point() else each for each in own]

        def run() -> Any:
            y = function(torch.nn.functional, *given)
            return y, torch.autograd.grad(y, leaves, error)

        return run

    return prepare


def tensor(leaf: Any) -> Any:
    """A tensor of its own memory; integers become PyTorch's long ones."""
    import torch

    array = np.array(leaf, np.float32 if leaf.dtype == "bfloat16" else None)
    own = torch.from_numpy(array)
    if leaf.dtype == "bfloat16":
        return own.to(torch.bfloat16)
    return own.long() if leaf.dtype == np.int32 else own


def one(function: Callable[..., Any]) -> dict[str, Prepare]:
    """An op that has one layout only."""
    return {"": torch_op(function)}


def of_trees(function: Callable[..., Any]) -> dict[str, Prepare]:
    """The same of a function whose arguments are pytrees of tensors, as ours are."""

    def prepare(dy: Any, *arguments: Any) -> Callable[[], Any]:
        structure = jax.tree.structure(arguments)

        def run(functional: Any, *leaves: Any) -> Any:
            return function(functional, *structure.unflatten(leaves))

        return torch_op(run)(dy, *arguments)

    return {"": prepare}


def images(function: Callable[..., Any], rank: int) -> dict[str, Prepare]:
    """An op of images (B, *S, C) of a rank, and perhaps of a kernel (*K, I, O), in both layouts.

    PyTorch's axes are in the order (B, C, *S) and (O, I, *K). In memory channels are first, as is
    its default, or last, as its documentation advises for convolutions.
    """

    def layout(last: bool) -> Prepare:
        def arrange(error: Any, x: Any, *more: Any) -> list[Any]:
            moved = [each.movedim(-1, 1) if each.ndim > 2 else each for each in (error, x)]
            moved += [w.movedim((-1, -2), (0, 1)) if w.ndim > 2 else w for w in more]
            return [placed(each) for each in moved]

        def placed(own: Any) -> Any:
            import torch

            if not last or own.ndim != rank:
                return own.contiguous()
            forms = {4: torch.channels_last, 5: torch.channels_last_3d}
            return own.contiguous(memory_format=forms[rank])

        return torch_op(function, arrange)

    forms = {"channels first": layout(False)}
    return forms | {"channels last": layout(True)} if rank in (4, 5) else forms


def peers(forms: Mapping[str, Prepare], *arguments: Any) -> list[Peer]:
    """PyTorch's forms, ready to run; none where it is not installed, or on another device."""
    if not forms or jax.devices()[0].platform != "cpu":
        return []
    try:
        import torch  # noqa: F401
    except ImportError:
        return []
    return [Peer(layout, prepare(*arguments)) for layout, prepare in forms.items()]
