"""Estimators that fail in the ways that the tests need; the only fakes there are."""

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin


class Failing(ClassifierMixin, BaseEstimator):
    """Fitted, and broken for whatever is not zero."""

    def __init__(self) -> None:
        self.classes_ = np.array(["a", "b"])
        self.n_features_in_ = 1

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict(self, X: Any) -> Any:
        if np.any(X):
            raise RuntimeError("the estimator is broken")
        return np.array(["a"] * len(X))


class Fixed(RegressorMixin, BaseEstimator):
    """Fitted, and always of the same opinion, which is an answer to one row."""

    n_features_in_ = 1

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict(self, X: Any) -> Any:
        return self.answer


class Worrying(Failing):
    """Fitted, and given to warnings of whatever is not zero."""

    def predict(self, X: Any) -> Any:
        import warnings

        if np.any(X):
            warnings.warn("a matter of\n  some concern", UserWarning, stacklevel=1)
        return np.array(["a"] * len(X))
