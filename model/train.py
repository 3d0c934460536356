"""Train the shipped predictor and write it, with golden rows, beside this file: `python -m model.train`.

The same code, data and libraries give the same bytes. Needs pandas, for the estimator to learn its features' names.
"""

import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import skops.io
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from model.describe import write_golden
from serving.predictor.golden import golden_path
from serving.predictor.model import make_model

ARTIFACT = Path(__file__).with_name("iris.skops")
FEATURES = ["sepal_length", "sepal_width", "petal_length", "petal_width"]  # cm
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip file can name


def train() -> LogisticRegression:
    """Fit on Fisher's iris data (150 flowers, UCI Machine Learning Repository), with the species' names as classes."""
    iris = load_iris(as_frame=True)
    X = iris.data.set_axis(FEATURES, axis="columns")
    y = np.asarray(iris.target_names)[iris.target]
    # Newton's steps end within rounding of the optimum; those of lbfgs up to 1 % beside it, as the BLAS rounds.
    estimator = LogisticRegression(solver="newton-cholesky", tol=1e-10)
    print(f"accuracy, 5-fold cross-validation: {cross_val_score(estimator, X, y, cv=5).mean():.3f}")
    return estimator.fit(X, y)


def dump(estimator: LogisticRegression) -> bytes:
    """Return the artifact; skops names its parts by memory address and time, so both are replaced by fixed ones."""
    source = zipfile.ZipFile(io.BytesIO(skops.io.dumps(estimator)))
    schema = source.read("schema.json").decode()
    addresses = dict.fromkeys(re.findall(r'"__id__": (\d+)', schema))
    names = {address: str(number) for number, address in enumerate(addresses)}
    schema = re.sub(r'(?<="__id__": )\d+', lambda match: names[match[0]], schema)
    schema = re.sub(r'\d+(?=\.npy")', lambda match: names[match[0]], schema)
    parts = {f"{names[name.removesuffix('.npy')]}.npy": name for name in source.namelist() if name != "schema.json"}
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for new, old in sorted(parts.items()):
            archive.writestr(zipfile.ZipInfo(new, EPOCH), source.read(old))
        archive.writestr(zipfile.ZipInfo("schema.json", EPOCH), json.dumps(json.loads(schema), indent=1))
    return target.getvalue()


def golden_rows() -> list[dict[str, float]]:
    """Return every tenth flower, of each species five."""
    return [dict(zip(FEATURES, row, strict=True)) for row in load_iris().data[::10].tolist()]


if __name__ == "__main__":
    estimator = train()
    ARTIFACT.write_bytes(dump(estimator))
    write_golden(make_model(estimator, ARTIFACT, {}), golden_rows())
    print(f"wrote {ARTIFACT} and {golden_path(ARTIFACT).name}")
