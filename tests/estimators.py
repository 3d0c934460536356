"""Estimators that fail in the ways that the tests need; the only fakes there are."""

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin


class Failing(ClassifierMixin, BaseEstimator):
    """Fitted, and broken whenever it is asked."""

    def __init__(self) -> None:
        self.classes_ = np.array(["a", "b"])
        self.n_features_in_ = 1

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict(self, X: Any) -> Any:
        raise RuntimeError("the estimator is broken")


class Undecided(RegressorMixin, BaseEstimator):
    """Fitted, and without an answer."""

    n_features_in_ = 1

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict(self, X: Any) -> Any:
        return np.full(len(X), np.nan)


class Worrying(Failing):
    """Fitted, and given to warnings."""

    def predict(self, X: Any) -> Any:
        import warnings

        warnings.warn("a matter of\n  some concern", UserWarning, stacklevel=1)
        return np.array(["a"] * len(X))
