"""Losses: each gives a sum and a weight, divided once, at the end."""

from backhand.losses.classification import sigmoid_cross_entropy, softmax_cross_entropy
from backhand.losses.regression import huber, mean_absolute_error, mean_squared_error

__all__ = [
    "huber",
    "mean_absolute_error",
    "mean_squared_error",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
]
