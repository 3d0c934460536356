"""Estimators with code of their own, many of which fail in the ways that the tests need; the only fakes there are."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder

from tests.lib.proc import children_of


def sleep_in_c(seconds: float) -> None:
    """Sleep as native code may: other threads run meanwhile, greenlets do not."""
    ctypes.CDLL(None).usleep(int(seconds * 1e6))


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
    """Fitted, given to warnings of whatever is not zero, and broken for what is over 100."""

    def predict(self, X: Any) -> Any:
        import warnings

        with warnings.catch_warnings():  # at which Python forgets what it has warned of
            if np.any(X > 100):
                return super().predict(X)
        if np.any(X):
            warnings.warn(f"a matter of\n  some concern: {X.max()} and '{X.max()}'", UserWarning, stacklevel=1)
        return np.array(["a"] * len(X))


class WorryingElsewhere(Worrying):
    """One that does so in a thread of its own."""

    def predict(self, X: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(super().predict, X).result()


class Duck:
    """No estimator of scikit-learn's, but it fits and predicts."""

    def fit(self, X: Any, y: Any) -> "Duck":
        return self

    def predict(self, X: Any) -> Any:
        return [int(value == "y") for value in np.asarray(X).ravel()]


class Categorical(Duck):
    """One that knows its columns by name, and takes categories of pandas' only, as LightGBM does."""

    feature_names_in_ = np.array(["a"], dtype=object)

    def predict(self, X: Any) -> Any:
        if list(X.columns) != ["a"] or X["a"].dtype.name != "category":
            raise ValueError("train and valid dataset categorical_feature do not match")
        return super().predict(X)


class Deadly(Duck):
    """Fitted, and the end of whatever process asks it."""

    def __init__(self, how: str) -> None:
        self.how = how

    def predict(self, X: Any) -> Any:
        if self.how == "exit":
            sys.exit(0)
        if self.how == "end":
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSEGV)


def as_words(table: Any) -> Any:
    return table.astype(str)


def worded() -> Any:
    """Return a pipeline to which 1 is another category than 1.0, as only its function knows."""
    return make_pipeline(FunctionTransformer(as_words), OneHotEncoder(handle_unknown="ignore"), LogisticRegression())


class Noting(RegressorMixin, BaseEstimator):
    """Fitted, and doubling x0 as soon as its gate is open; it notes how many rows each call has, and breaks on -1."""

    n_features_in_ = 1

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: type[BaseException] = RuntimeError
        self.most = 1_000_000  # rows that it takes

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict(self, X: Any) -> Any:
        self.calls.append(len(X))
        self.gate.wait(30)
        if len(X) > self.most:
            raise ValueError("too many rows")
        if -1 in X:
            raise self.error("the estimator is broken")
        return np.ravel(X) * 2.0


class Centring(RegressorMixin, BaseEstimator):
    """Fitted, and answering how far a row is from the mean of its call."""

    n_features_in_ = 1

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict(self, X: Any) -> Any:
        return np.ravel(X) - np.mean(X)


class Forking(Duck):
    """One that forks at each call; what it forks returns, raises or exits, as x0 says."""

    n_features_in_ = 1

    def predict(self, X: Any) -> Any:
        if os.fork() == 0:
            if 1 in X:
                raise RuntimeError("of the child")
            if 2 in X:
                sys.exit()
        return [0] * len(X)


class Slow(RegressorMixin, BaseEstimator):
    """Fitted, and busy for some seconds, in Python, at each call."""

    n_features_in_ = 1

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict(self, X: Any) -> Any:
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass
        return np.ravel(X)


class Gated(Slow):
    """One that notes in a file how many rows each call has. Asked for 666 it then tells by another that it has begun,
    and does not end until a third is there."""

    def __init__(self, seconds: float, folder: Path) -> None:
        super().__init__(seconds)
        self.folder = folder

    def predict(self, X: Any) -> Any:
        with (self.folder / "calls").open("a") as file:
            file.write(f"{len(X)}\n")
        if 666 in X:
            (self.folder / "begun").touch()
        sleep_in_c(self.seconds)
        while 666 in X and not (self.folder / "open").exists():
            sleep_in_c(self.seconds)
        return np.ravel(X)


class SlowToLoad(LogisticRegression):
    """One whose artifact takes seconds to load, as large ones do."""

    def __setstate__(self, state: Any) -> None:
        time.sleep(float(os.environ.get("LOAD_S", "0")))
        super().__setstate__(state)


class Hanging(Duck):
    """One that takes `call_s` for a call, and never ends one that has 666."""

    n_features_in_ = 1

    def __init__(self, call_s: float) -> None:
        self.call_s = call_s

    def predict(self, X: Any) -> Any:
        end = time.perf_counter() + self.call_s
        while time.perf_counter() < end or 666 in X:
            pass
        return [0] * len(X)


class Threading(Duck):
    """One that starts a thread when it is loaded."""

    n_features_in_ = 1

    def __init__(self) -> None:
        self.state = "which a pickle has only if there is one"

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)
        threading.Thread(target=threading.Event().wait, name="of the model", daemon=True).start()


class Endless(Duck):
    """One that never ends when it is loaded, when it is loaded by a master of workers, or when it predicts: it waits,
    it computes, or it computes in C."""

    n_features_in_ = 1

    def __init__(self, when: str, how: str) -> None:
        self.when, self.how = when, how

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)
        if self.when == "load" or (self.when == "load beside workers" and children_of(os.getpid())):
            self.go_on()

    def predict(self, X: Any) -> Any:
        if self.when == "predict":
            self.go_on()
        return [0] * len(X)

    def go_on(self) -> None:
        while self.how == "compute":
            pass
        if self.how == "compute in C":
            sum(range(10**15))  # in which no other thread of Python's has a turn
        threading.Event().wait()


class Unpatched(Duck):
    """One that fails where gevent has patched Python's standard library."""

    n_features_in_ = 1

    def predict(self, X: Any) -> Any:
        if socket.socket.__module__ != "socket":
            raise RuntimeError("as it was told to")
        return [0] * len(X)


class Waiting(Threading):
    """One that starts a thread when it is loaded for which Python waits when it ends."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)
        threading.Thread(target=threading.Event().wait, name="of the model").start()


class Table(Duck):
    """One that computes with polars, whose threads it starts when it is loaded or when it first predicts."""

    n_features_in_ = 1

    def __init__(self, when: str) -> None:
        self.when = when

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)
        if self.when == "load":
            self.compute()

    def compute(self) -> float:
        import polars

        table = polars.DataFrame({"key": [1, 2, 3] * 100, "value": [1.0, 2.0, 3.0] * 100})
        sums = table.lazy().sort("value").group_by("key").agg(polars.col("value").sum()).collect()
        return float(sums["value"].sum())

    def predict(self, X: Any) -> Any:
        return [self.compute()] * len(X)
