"""Real handwritten digits, without a download."""

from typing import Any

import numpy as np
import numpy.typing as npt


def digits() -> dict[str, npt.NDArray[Any]]:
    """The 1,797 handwritten digits that scikit-learn carries.

    Images of 8 x 8 pixels, flattened row by row; `inputs.reshape(-1, 8, 8)` shows them. Nothing
    is downloaded.

    Returns:
        `inputs`, float32 of shape (1797, 64) in [0, 1], and `targets`, int32 of shape (1797,), the
        digit from 0 to 9.

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> from backhand.data import digits
        >>> data = digits()
        >>> data["inputs"].shape, data["targets"][:5].tolist()
        ((1797, 64), [0, 1, 2, 3, 4])

    References:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits() needs scikit-learn, which could not be imported; "
            'install it with: pip install "backhand[examples]"'
        ) from error
    data = load_digits()
    return {
        "inputs": (data.data / 16).astype(np.float32),
        "targets": data.target.astype(np.int32),
    }
