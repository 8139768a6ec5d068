"""The table's rows of losses."""

from typing import Any

from backhand import losses
from backhand.catalogue.row import Row, Spec

IDS = Spec("ids", "B T", below="V")
EDGES = ({"B": 1}, {"V": 1}, {"B": 0})


def _weights(axes: str) -> Spec:
    """Weights per example or per position, some of them zero."""
    return Spec("weights", axes, wide=True)


def _fused(weight: str, weights: Spec | None, **settings: Any) -> Row:
    """An output layer with its loss, from (B, T, D)."""
    x, w = Spec("normal", "B T D"), Spec("normal", weight, wide=True)
    op = losses.linear_cross_entropy
    return Row("losses.linear_cross_entropy", op, (x, w, IDS, weights), settings, edges=EDGES)


def _ctc(weights: Spec | None, **settings: Any) -> Row:
    """Seven frames and up to three labels below 5; some are too many, some none."""
    targets = {
        "labels": Spec("ids", "B 3", below="5"),
        "label_lengths": Spec("ids", "B", below="4"),
        "input_lengths": Spec("ids", "B", below="8"),
    }
    inputs = (Spec("normal", "B 7 6"), targets, weights)
    return Row("losses.ctc", losses.ctc, inputs, settings, edges=({"B": 1}, {"B": 0}))


def _loss(name: str, targets: Spec, weights: Spec | None, x: str = "B T V", **settings: Any) -> Row:
    """A loss of predictions."""
    edges = tuple(e for e in EDGES if not e.keys() - set(x.split()))
    inputs = (Spec("normal", x), targets, weights)
    return Row(f"losses.{name}", getattr(losses, name), inputs, settings, edges=edges)


def _triplet(predictions: Any, weights: Spec | None, **settings: Any) -> Row:
    return Row("losses.triplet", losses.triplet, (predictions, None, weights), settings)


def _balanced(targets: Spec, weights: Spec | None, **settings: Any) -> Row:
    """A loss of predictions (B, T, V) with balances (B,)."""
    predictions = (Spec("normal", "B T V"), Spec("normal", "B"))
    inputs, edges = (predictions, targets, weights), ({"B": 1}, {"B": 0})
    return Row("losses.with_balance", losses.with_balance, inputs, settings, edges=edges)


def _stateful(targets: Spec, weights: Spec | None, **settings: Any) -> Row:
    """A loss of predictions (B, T, V) with the state (B, U) of what made them."""
    predictions = (Spec("normal", "B T V"), Spec("normal", "B U"))
    inputs, edges = (predictions, targets, weights), ({"B": 1}, {"B": 0})
    return Row("losses.with_state", losses.with_state, inputs, settings, edges=edges)


def _paired(predictions: Any, weights: Spec | None, **settings: Any) -> Row:
    inputs = (predictions, None, weights)
    return Row("losses.paired", losses.paired, inputs, settings, edges=({"B": 1}, {"B": 0}))


NUMBERS = Spec("normal", "B T V")
SHARES = Spec("shares", "B T V")
PROBABILITIES = Spec("probabilities", "B T V")
BITS = Spec("mask", "B T V")

ROWS: tuple[Row, ...] = (
    _fused("D V", None),
    _fused("D V", _weights("B T"), soft_cap=2.0, z_loss=0.1, label_smoothing=0.2),
    _fused("V D", _weights("B"), tied=True, soft_cap=3.0),
    _fused("D V", _weights("B"), z_loss=0.1, rows=5),
    _fused("V D", _weights("B T"), tied=True, soft_cap=2.0, label_smoothing=0.2, rows=4),
    _ctc(None, blank=5),
    _ctc(_weights("B"), blank=5),
    _loss("kl_divergence", PROBABILITIES, None),
    _loss("kl_divergence", PROBABILITIES, _weights("B T")),
    _loss("kl_divergence", NUMBERS, _weights("B"), log_targets=True),
    _loss("cosine_distance", NUMBERS, None),
    _loss("cosine_distance", NUMBERS, _weights("B T")),
    _loss("hinge", BITS, None),
    _loss("hinge", SHARES, _weights("B"), margin=0.5),
    _loss("multiclass_hinge", IDS, None),
    _loss("multiclass_hinge", IDS, _weights("B T"), margin=0.5),
    _loss("sigmoid_focal", BITS, None),
    _loss("sigmoid_focal", SHARES, _weights("B"), gamma=1.5, alpha=0.25),
    _loss("softmax_focal", IDS, None),
    _loss("softmax_focal", PROBABILITIES, _weights("B T"), gamma=1.5),
    _loss("dice", Spec("mask", "B T 2 V"), None, "B T 2 V"),
    _loss("dice", SHARES, _weights("B"), smooth=0.5),
    _triplet((Spec("normal", "B T D"),) * 3, None),
    _triplet(Spec("normal", "B 3 T D"), _weights("B"), margin=3.0),
    _balanced(IDS, None, loss=losses.softmax_cross_entropy),
    _balanced(NUMBERS, _weights("B T"), loss=losses.mean_squared_error, coefficient=0.5),
    _stateful(IDS, None, loss=losses.softmax_cross_entropy),
    _stateful(NUMBERS, _weights("B T"), loss=losses.mean_squared_error),
    _loss("info_nce", Spec("normal", "B D"), None, "B D"),
    _loss("info_nce", Spec("normal", "B D"), _weights("B"), "B D", temperature=0.5),
    _loss("info_nce", Spec("normal", "B D"), _weights("B"), "B D", temperature=0.5, symmetric=True),
    _paired((Spec("normal", "B D"),) * 2, None, loss=losses.info_nce),
    _paired(Spec("normal", "B 2 T D"), _weights("B T"), loss=losses.cosine_distance),
)
