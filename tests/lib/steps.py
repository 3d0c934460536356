"""Steps as users write them: none keeps the names of its features, and each takes rows in one form only."""

from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin


class Step(TransformerMixin, BaseEstimator):
    def fit(self, X: Any, y: Any = None) -> Any:
        self.is_fitted_ = True
        return self


class Months(Step):
    def transform(self, X: Any) -> Any:
        return np.column_stack([pd.to_datetime(X["when"]).dt.month, X["size"]])


class Lengths(Step):
    """One that finds texts by the type that pandas 3 gives them."""

    def transform(self, X: Any) -> Any:
        return pd.DataFrame({name: X[name].str.len() for name in X.select_dtypes("str")}).assign(size=X["size"])


class OldLengths(Step):
    """One that finds texts by the type that pandas gave them before."""

    def transform(self, X: Any) -> Any:
        found = [name for name in X if X[name].dtype == object]
        return pd.DataFrame({name: X[name].str.len() for name in found}).assign(size=X["size"])[["city", "size"]]


class Codes(Step):
    def transform(self, X: Any) -> Any:
        return np.column_stack([X["city"].cat.codes, X["size"]])


class NamedCodes(Codes):
    """One that keeps the names of its features."""

    def fit(self, X: Any, y: Any = None) -> Any:
        self.feature_names_in_, self.n_features_in_ = np.array(X.columns, dtype=object), X.shape[1]
        return self


class Suffixes(Step):
    """One for which a category of pandas' will not do."""

    def transform(self, X: Any) -> Any:
        return np.column_stack([(X["city"] + "/").str.len(), X["size"]])


class Types(Step):
    """One that looks at the types of all columns."""

    def transform(self, X: Any) -> Any:
        kinds = "".join(X[name].dtype.kind for name in ("city", "count", "flag", "size"))
        if kinds not in ("Oibf", "Uibf"):
            raise ValueError(f"columns are {kinds}")
        return np.column_stack([X["city"].str.len(), X["count"] * 1.0, ~X["flag"] * 1.0, X["size"]])


class ByName(Step):
    def transform(self, X: Any) -> Any:
        return np.column_stack([X["size"] * 2, X["weight"]])


class ByPlace(Step):
    def transform(self, X: Any) -> Any:
        return np.column_stack([X[:, 0] * 2, X[:, 1]])


class TextByPlace(Step):
    def transform(self, X: Any) -> Any:
        return np.column_stack([[len(text) for text in X[:, 0]], X[:, 1].astype(float)])


class Renamed(Step):
    """One that hands on what it gets, if that is a DataFrame."""

    def transform(self, X: Any) -> Any:
        return X.rename(columns=str)


class Chosen(Step):
    """One that asks what is before it for names."""

    def transform(self, X: Any) -> Any:
        return X[[name for name in X.columns if name != "weight"]]


class InPolars(Step):
    def transform(self, X: Any) -> Any:
        return X.select("size").to_numpy()


class LookedUp(Step):
    def transform(self, X: Any) -> Any:
        return np.array([[{"a": 1, "bbb": 2, "cc": 3}[text]] for text in X["city"]])


class Unfinished(Step):
    def transform(self, X: Any) -> Any:
        return self.table_[X]


def lengths(X: Any) -> Any:
    return X.apply(lambda column: column.str.len())


def codes(X: Any) -> Any:
    return X.apply(lambda column: column.cat.codes)


def stop_at_zero(X: Any) -> Any:
    if not np.all(X):
        raise ValueError("a size should be more than nothing")
    return X


def recur_at_zero(X: Any) -> Any:
    return X if np.all(X) else recur_at_zero(X)
