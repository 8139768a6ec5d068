"""The table's rows of pooling."""

from typing import Any

from jax import Array

from backhand import layers, ops
from backhand.catalogue.row import Row, Spec
from backhand.visit import Params

LINE, IMAGE, VOLUME = (Spec("normal", axes) for axes in ("B 7 D", "B 5 6 D", "B 2 4 3 D"))
EDGES = ({"B": 1}, {"D": 1}, {"B": 0})


def _op(name: str, x: Spec = IMAGE, *mask: Spec | None, **settings: Any) -> Row:
    return Row(f"ops.{name}", getattr(ops, name), (x, *mask), settings, edges=EDGES)


def _layer(name: str, x: Spec = IMAGE, mask: Spec | None = None, **settings: Any) -> Row:
    op, side = getattr(ops, name), {} if mask is None else {"mask": mask}

    def textbook(params: Params, x: Array, **side: Array) -> Array:
        reference: Array = op.reference(x, *side.values(), **settings)
        return reference

    make = getattr(layers, name)
    return Row(f"layers.{name}", make, (x,), settings, side, textbook, EDGES)


ROWS: tuple[Row, ...] = (
    _op("max_pool", window=(2, 2)),
    _op("max_pool", window=(3, 2), stride=(2, 1), padding="SAME"),
    _op("max_pool", LINE, window=(3,), stride=(4,), padding=((1, 2),)),
    _op("max_pool", VOLUME, window=(2, 2, 2), stride=(1, 2, 1)),
    _op("average_pool", window=(2, 2)),
    _op("average_pool", window=(3, 2), stride=(2, 1), padding="SAME"),
    _op("average_pool", LINE, window=(3,), padding=((1, 2),), count_padding=True),
    _op("average_pool", VOLUME, window=(2, 2, 2), stride=(1, 2, 1)),
    _op("global_average_pool", IMAGE, None),
    _op("global_average_pool", LINE, Spec("mask", "B 7")),
    _op("global_max_pool", IMAGE, None),
    _op("global_max_pool", IMAGE, Spec("mask", "B 5 6")),
    _op("adaptive_average_pool", sizes=(5, 3)),
    _op("adaptive_average_pool", sizes=(3, 4)),
    _op("adaptive_average_pool", VOLUME, sizes=(1, 3, 2)),
    _layer("max_pool", window=(3, 3), stride=(2, 2), padding="SAME"),
    _layer("average_pool", window=(2, 3)),
    _layer("global_average_pool", LINE),
    _layer("global_max_pool", VOLUME),
    _layer("global_average_pool", IMAGE, Spec("mask", "B 5 6")),
    _layer("global_max_pool", LINE, Spec("mask", "B 7")),
    _layer("adaptive_average_pool", LINE, sizes=(3,)),
)
