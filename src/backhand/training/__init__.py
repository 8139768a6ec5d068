"""Training: the state, and the step that moves it."""

from backhand.training.state import TrainState, train_state
from backhand.training.step import train_step

__all__ = ["TrainState", "train_state", "train_step"]
