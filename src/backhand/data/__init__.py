"""Data as a function of the step, and the sources that the examples train on."""

from backhand.data.batches import Batches
from backhand.data.csv_table import read_table
from backhand.data.digits import digits
from backhand.data.encoder import Categorical, Encoder, Numeric, fit_encoder
from backhand.data.houses import houses
from backhand.data.split import train_test_split
from backhand.data.table import Table

__all__ = [
    "Batches",
    "Categorical",
    "Encoder",
    "Numeric",
    "Table",
    "digits",
    "fit_encoder",
    "houses",
    "read_table",
    "train_test_split",
]
