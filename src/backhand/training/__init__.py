"""Training: the state, and the step that moves it."""

from backhand.training.state import Average, LossScale, TrainState, learned, train_state
from backhand.training.step import TrainStep, train_step

__all__ = [
    "Average",
    "LossScale",
    "TrainState",
    "learned",
    "TrainStep",
    "train_state",
    "train_step",
]
