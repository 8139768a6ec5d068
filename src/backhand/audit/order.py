"""The leaves of parameters in the order in which a model has its layers."""

from collections.abc import Iterator
from typing import Any

import jax

from backhand.protocol import Layer
from backhand.visit import PyTree


def in_model_order(model: Layer | None, tree: PyTree) -> Iterator[tuple[str, Any]]:
    """The leaves of parameters and their paths, in the order of the model's layers.

    A dict comes back from jit in alphabetical order; the layer knows its parts.
    """
    parts = model.parts if model is not None else {}
    children = dict(enumerate(tree)) if isinstance(tree, tuple | list) else tree
    if not parts or not isinstance(children, dict):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf
        return
    for name in [*(n for n in parts if n in children), *(n for n in children if n not in parts)]:
        for inside, leaf in in_model_order(parts.get(name), children[name]):
            yield f"{name}/{inside}".rstrip("/"), leaf
