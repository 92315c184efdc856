"""Which class is taken for which; without PyTorch, as reports need no more."""

import numpy as np


def confusion_matrix(answers: np.ndarray, targets: np.ndarray, n_classes: int) -> np.ndarray:
    """Clips (true class, answer) int64, of class numbers (clip,)."""
    return np.bincount(targets * n_classes + answers, minlength=n_classes**2).reshape(n_classes, n_classes)
