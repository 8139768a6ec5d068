"""Losses: each gives a sum and a weight, divided once, at the end."""

from backhand.losses.balance import with_balance
from backhand.losses.classification import sigmoid_cross_entropy, softmax_cross_entropy
from backhand.losses.contrastive import info_nce
from backhand.losses.ctc import ctc
from backhand.losses.divergence import kl_divergence
from backhand.losses.focal import sigmoid_focal, softmax_focal
from backhand.losses.linear_cross_entropy import linear_cross_entropy
from backhand.losses.margin import hinge, multiclass_hinge
from backhand.losses.paired import paired
from backhand.losses.regression import huber, mean_absolute_error, mean_squared_error
from backhand.losses.segmentation import dice
from backhand.losses.similarity import cosine_distance, triplet
from backhand.losses.state import with_state

__all__ = [
    "cosine_distance",
    "ctc",
    "dice",
    "hinge",
    "huber",
    "info_nce",
    "kl_divergence",
    "linear_cross_entropy",
    "mean_absolute_error",
    "mean_squared_error",
    "multiclass_hinge",
    "paired",
    "sigmoid_cross_entropy",
    "sigmoid_focal",
    "softmax_cross_entropy",
    "softmax_focal",
    "triplet",
    "with_balance",
    "with_state",
]
