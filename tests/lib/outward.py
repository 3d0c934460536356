"""Estimators that reach outside of their process by names which their module took when it was imported."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from urllib3.util.ssl_ import create_urllib3_context

from tests.lib.estimators import Duck

Popen = subprocess.Popen
POOL = ThreadPoolExecutor(1)


class Secured(Duck):
    """One that makes a context for TLS where x0 is over 5, and answers with x0."""

    n_features_in_ = 1

    def predict(self, X: Any) -> Any:
        if np.max(X) > 5:
            create_urllib3_context()
        return np.ravel(X)


class Starting(Duck):
    """One that starts a program, by a name that was taken early or that it looks up."""

    n_features_in_ = 1

    def __init__(self, is_early: bool) -> None:
        self.is_early = is_early

    def predict(self, X: Any) -> Any:
        with (Popen if self.is_early else subprocess.Popen)(["echo", "1"], stdout=subprocess.PIPE) as program:
            return [int(program.communicate()[0])] * len(X)


class Pooling(Duck):
    """One that waits for a pool of threads, which was made when the module was imported."""

    n_features_in_ = 1

    def predict(self, X: Any) -> Any:
        return [*POOL.map(float, np.ravel(X))]
