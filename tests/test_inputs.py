"""What the contract takes from a fitted estimator, and that real tables are served right by it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from jsonschema import Draft202012Validator
from sklearn.compose import make_column_transformer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import (
    AdaBoostRegressor,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    VotingClassifier,
)
from sklearn.feature_extraction import DictVectorizer, FeatureHasher
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import CategoricalNB
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import (
    Binarizer,
    FunctionTransformer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    StandardScaler,
    TargetEncoder,
)

import app
from serving.errors import ModelError, SettingsError, Unprocessable
from serving.predictor.arrays import Arrays
from serving.predictor.contract import Contract
from serving.predictor.features import FeatureSettings, describe_cell
from serving.predictor.inputs import read_inputs
from serving.web.messages import Response
from tests.lib import estimators
from tests.lib.apps import call, make_settings, serve_estimator
from tests.lib.artifacts import deploy
from tests.lib.cases import Case
from tests.lib.clients import post_case
from tests.lib.pipelines import ESTIMATORS, FILMS, ISLANDS, NUMBERS, PENGUINS, SPECIES, fitted, rows_of
from tests.lib.servers import PROJECT


def contract_of(estimator: Any, **features: Any) -> Contract:
    return Contract(read_inputs(estimator), make_settings(features=features).features)


@pytest.mark.in_turn
@pytest.mark.parametrize("name", ESTIMATORS)
def test_table_is_served_as_the_estimator_answers_it(tmp_path: Path, framework: str, name: str) -> None:
    """Every row of a real table, nulls and strings included, gets the estimator's own answer, and no warning."""
    estimator, table = fitted(name)
    expected = estimator.predict(table)
    scores = estimator.predict_proba(table) if hasattr(estimator, "predict_proba") else None
    rows = rows_of(table[contract_of(estimator).names])
    native = serve_estimator(tmp_path / "model.joblib", estimator, framework=framework)
    answers = call(native, post_case(rows)).json
    given = [answer["prediction"] for answer in answers]
    if isinstance(scores, list):
        assert [list(prediction.values()) for prediction in given] == expected.tolist()
        probabilities = [[list(each.values()) for each in answer["probabilities"].values()] for answer in answers]
        for output, score in enumerate(scores):
            np.testing.assert_allclose([row[output] for row in probabilities], score, rtol=1e-12)
    elif scores is not None:
        assert given == expected.tolist()
        np.testing.assert_allclose([[*answer["probabilities"].values()] for answer in answers], scores, rtol=1e-12)
    elif isinstance(given[0], str):
        assert given == expected.tolist()
    else:
        np.testing.assert_allclose(given, expected, rtol=1e-12)
    one = call(native, post_case(rows[3])).json["prediction"]
    assert one == (given[3] if isinstance(one, dict | str) else pytest.approx(given[3], rel=1e-12))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("boosting", "frame"),
        ("native-categories", "frame"),
        ("function", "frame"),
        ("dataframe-output", "frame"),
        ("numbers", "array"),
        ("numbers-by-name", "array"),
    ],
)
def test_dataframe_is_made_only_where_it_is_needed(name: str, form: str) -> None:
    """Numbers go to scikit-learn's own as one float array, though it was fitted on named columns."""
    estimator, table = fitted(name)
    contract = contract_of(estimator)
    arrays = Arrays(contract)
    X = arrays.of_rows(contract.parse_payload(rows_of(table)[:5]))
    assert arrays.form == form
    if form == "frame":
        assert list(X.columns) == list(table.columns)
        assert [X[column].dtype.kind for column in NUMBERS if column in X] == ["f"] * len(set(NUMBERS) & set(X))
    else:
        assert (X.dtype, X.shape) == (np.float64, (5, 3))


def test_features_come_from_the_estimator() -> None:
    """Encoders give choices, imputers null and typical values, and every feature its type."""
    features = contract_of(fitted("boosting")[0]).features
    island, sex, bill = (features[name] for name in ("island", "sex", "bill_length_mm"))
    assert (island.type, island.choices, island.missing, island.example) == ("str", ISLANDS, True, "Biscoe")
    assert (sex.choices, sex.example) == (["female", "male"], "male")
    assert (bill.type, bill.choices, bill.missing, bill.example) == ("float", None, True, 43.92)


def read(estimator: Any, X: Any, y: Any) -> FeatureSettings:
    contract = contract_of(estimator.fit(X, y))
    return contract.features[contract.names[0]]


NAMED = pd.DataFrame({"a": ["x", "y", "z", "x"], "n": [1.0, 2.0, 3.0, 4.0]})
GAP = pd.DataFrame({"a": ["x", np.nan, "z", "x"]}, dtype=object)
NONE = pd.DataFrame({"a": ["x", None, "z", "x"]}, dtype=object)
MIXED = pd.DataFrame({"a": [1, None, 2, 1], "b": [1, 2, 3, 4]}, dtype=object)
GAPS = MIXED.fillna(np.nan).astype(object)
KNOWN = [[1, 2, 3], [0, 1]]
UNKNOWN_IS_NAN = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan)
COUNTS = pd.DataFrame({"a": [1, 2, 3, 1], "b": [0, 1, 0, 1]})
FLAGS = pd.DataFrame({"a": [True, False, True, True]})
Y = [0, 1, 0, 1]


def encoded(encoder: Any) -> Any:
    return make_pipeline(make_column_transformer((encoder, ["a"]), remainder="passthrough"), LogisticRegression())


@pytest.mark.parametrize(
    ("estimator", "X", "kind", "choices", "missing"),
    [
        (encoded(OneHotEncoder()), NAMED, "str", ["x", "y", "z"], False),
        (encoded(OneHotEncoder(handle_unknown="ignore")), NAMED, "str", None, False),
        (encoded(OneHotEncoder(handle_unknown="infrequent_if_exist")), NAMED, "str", None, False),
        (encoded(OneHotEncoder()), GAP, "str", ["x", "z"], True),
        (encoded(OneHotEncoder()), NONE, "str", ["x", "z"], True),
        (encoded(OrdinalEncoder()), NAMED, "str", ["x", "y", "z"], False),
        (encoded(OrdinalEncoder()), COUNTS, "int", [1, 2, 3], False),
        (encoded(OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)), NAMED, "str", None, False),
        (encoded(OrdinalEncoder(encoded_missing_value=-1)), GAP, "str", ["x", "z"], True),
        (encoded(TargetEncoder(cv=2)), NAMED, "str", None, False),
        (encoded(OneHotEncoder()), FLAGS, "bool", [False, True], False),
        (make_pipeline(OneHotEncoder(), LogisticRegression()), NAMED[["a"]].to_numpy(), "str", ["x", "y", "z"], False),
        (encoded(make_pipeline(OrdinalEncoder(), SimpleImputer())), GAP, "str", ["x", "z"], True),
        (make_pipeline(StandardScaler(), SimpleImputer(), Ridge()), NAMED[["n"]], "float", None, True),
        (make_pipeline(StandardScaler(), Ridge()), NAMED[["n"]], "float", None, False),
        (make_pipeline(PolynomialFeatures(), SimpleImputer(), Ridge()), NAMED[["n"]], "float", None, False),
        (make_pipeline(make_union(SimpleImputer(), StandardScaler()), Ridge()), NAMED[["n"]], "float", None, False),
        (make_pipeline("passthrough", SimpleImputer(), Ridge()), NAMED[["n"]], "float", None, True),
        (CategoricalNB(), COUNTS, "int", [0, 1, 2, 3], False),
        (encoded(UNKNOWN_IS_NAN), NAMED, "str", ["x", "y", "z"], False),
        (encoded(make_pipeline(UNKNOWN_IS_NAN, SimpleImputer())), NAMED, "str", None, True),
        (encoded(OrdinalEncoder()), NONE, "str", ["x", "z"], True),
        (encoded(make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder())), MIXED, "int", [1, 2], True),
        (make_pipeline(SimpleImputer(strategy="constant", fill_value=0), Ridge()), GAPS, "float", None, True),
        (make_pipeline(SimpleImputer(strategy="most_frequent"), Ridge()), GAPS, "float", None, True),
        (
            AdaBoostRegressor(make_pipeline(OneHotEncoder(categories=KNOWN), Ridge())),
            COUNTS.to_numpy(),
            "int",
            [1, 2, 3],
            False,
        ),
        (encoded(OneHotEncoder()), COUNTS.astype({"a": object}), "int", [1, 2, 3], False),
        (encoded(OneHotEncoder()), MIXED, "int", [1, 2], True),
        (make_pipeline(Binarizer(threshold=2), OneHotEncoder(), Ridge()), NAMED[["n"]], "float", None, False),
        (
            make_pipeline(SimpleImputer(add_indicator=True), OneHotEncoder(), Ridge()),
            NAMED[["n"]],
            "float",
            [1, 2, 3, 4],
            True,
        ),
        (make_pipeline(MissingIndicator(features="all"), Ridge()), NAMED[["n"]], "float", None, True),
        (DummyClassifier(), NAMED[["n"]], "float", None, True),
        (RandomForestClassifier(n_estimators=2), NAMED[["n"]], "float", None, False),
        (HistGradientBoostingClassifier(max_iter=2), NAMED[["n"]], "float", None, True),
    ],
)
def test_parts_say_what_they_take(estimator: Any, X: Any, kind: str, choices: Any, missing: bool) -> None:
    """Each kind of encoder, imputer and estimator gives its first feature's type, choices and missing."""
    feature = read(estimator, X, Y)
    assert (feature.type, feature.choices, feature.missing) == (kind, choices, missing)


@pytest.mark.parametrize("null", [-1, -1.0, np.nan], ids=repr)
def test_null_is_what_the_imputer_fills(tmp_path: Path, null: float) -> None:
    """A null reaches the imputer as the missing value that it was fitted with."""
    X = np.array([[1, 5], [null, 6], [3, 7], [4, 9]])
    estimator = make_pipeline(SimpleImputer(missing_values=null), LinearRegression()).fit(X, [1, 2, 3, 4])
    expected = estimator.predict([[null, 6]])[0]
    answer = call(serve_estimator(tmp_path / "model.joblib", estimator), post_case({"x0": None, "x1": 6}))
    assert answer.json == {"prediction": pytest.approx(expected, rel=1e-12)}


@pytest.mark.parametrize("table", [GAP, NONE], ids=["nan", "none"])
def test_null_is_the_category_that_was_missing(tmp_path: Path, table: Any) -> None:
    """A null is the encoder's own missing category, NaN or None."""
    estimator = encoded(OneHotEncoder()).fit(table, Y)
    expected = estimator.predict_proba(table)[1].tolist()
    answer = call(serve_estimator(tmp_path / "model.joblib", estimator), post_case({"a": None}))
    assert [*answer.json["probabilities"].values()] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("table", "estimator", "row"),
    [
        (COUNTS.astype({"a": object}), encoded(OneHotEncoder()), {"a": 2, "b": 1}),
        (MIXED, encoded(OneHotEncoder()), {"a": 2, "b": 1}),
        (MIXED, encoded(OneHotEncoder()), {"a": None, "b": 1}),
        (COUNTS.astype("Int64"), make_pipeline(SimpleImputer(missing_values=pd.NA), Ridge()), {"a": None, "b": 1}),
        (FLAGS.astype(object), make_pipeline(SimpleImputer(strategy="most_frequent"), Ridge()), {"a": None}),
    ],
    ids=["integers", "with-none", "none", "pandas-null", "truth"],
)
def test_cells_are_of_the_type_that_was_fitted(tmp_path: Path, table: Any, estimator: Any, row: dict[str, Any]) -> None:
    """Python's integers stay what they are among objects, and so do None and pandas' own null."""
    estimator.fit(table, Y)
    null = next((value for value in table["a"] if pd.isna(value)), pd.NA if table["a"].dtype == "Int64" else np.nan)
    asked = pd.DataFrame([{name: null if cell is None else cell for name, cell in row.items()}]).astype(table.dtypes)
    expected = estimator.predict(asked)[0].item()
    native = serve_estimator(tmp_path / "model.joblib", estimator)
    assert call(native, post_case(row)).json["prediction"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("features", "row"),
    [
        ({}, {"x0": 4, "x1": 0, "x2": 1}),
        ({"x2": {}, "x1": {}, "x0": {}}, {"x2": 1, "x1": 0, "x0": 4}),
        ({"x1": {"unit": "cm"}}, {"x0": 4, "x1": 0, "x2": 1}),
        ({"a": {}, "b": {}, "c": {}}, {"c": 1, "a": 4, "b": 0}),
    ],
    ids=["none", "permuted", "one", "renamed"],
)
def test_nameless_columns_keep_their_places(tmp_path: Path, features: dict[str, Any], row: dict[str, float]) -> None:
    """Made names stand for their column wherever the settings have them; other names stand in the columns' order."""
    estimator = LinearRegression().fit(np.eye(3), [1, 2, 3])
    native = serve_estimator(tmp_path / "model.joblib", estimator, features=features)
    assert call(native, post_case(row)).json["prediction"] == pytest.approx(estimator.predict([[4, 0, 1]])[0])


@pytest.mark.parametrize(
    "features", [{}, {"x1": {}, "x2": {}}, {"width": {}, "height": {}}], ids=["none", "made", "new"]
)
def test_nameless_columns_that_are_used_can_be_named(tmp_path: Path, features: dict[str, Any]) -> None:
    """Of an estimator fitted on an array, those columns have names in the settings that it does not drop."""
    transformer = make_column_transformer((StandardScaler(), [1, 2]))
    estimator = make_pipeline(transformer, LinearRegression()).fit(np.eye(3), [1, 2, 3])
    expected = estimator.predict([[0, 5, 6]])[0]
    native = serve_estimator(tmp_path / "model.joblib", estimator, features=features)
    row = dict(zip(features or ("x1", "x2"), (5, 6), strict=True))
    assert call(native, post_case(row)).json["prediction"] == pytest.approx(expected)


@pytest.mark.parametrize("estimator", [estimators.Duck(), estimators.Categorical()], ids=["duck", "category"])
def test_foreign_estimator_is_served(tmp_path: Path, estimator: Any) -> None:
    """What is not of scikit-learn at all is served by what the settings say; strings with choices are categories."""
    features = {"a": {"type": "str", "choices": ["x", "y"]}}
    native = serve_estimator(tmp_path / "model.joblib", estimator, features=features)
    assert call(native, post_case([{"a": "y"}, {"a": "x"}])).json == [{"prediction": 1}, {"prediction": 0}]


def test_part_that_looks_at_nothing_asks_for_nothing() -> None:
    """Columns that only a baseline gets are no features."""
    looking = make_pipeline(make_column_transformer((StandardScaler(), ["n"])), LogisticRegression())
    voting = VotingClassifier([("a", looking), ("b", DummyClassifier())]).fit(NAMED, Y)
    assert contract_of(voting).names == ["n"]


def test_truths_can_be_asked_for_where_categories_are_0_and_1() -> None:
    """An encoder that was fitted on 0 and 1 is asked with false and true, if the settings have it so."""
    contract = contract_of(encoded(OneHotEncoder()).fit(COUNTS[["b"]].set_axis(["a"], axis=1), Y), a={"type": "bool"})
    assert contract.features["a"].choices == [False, True]
    assert Arrays(contract).of_rows(contract.parse_payload({"a": True})) == [[1.0]]


def test_nameless_pipeline_with_dataframes_inside_does_not_warn(tmp_path: Path) -> None:
    """Names that only the steps of a pipeline know are left to them."""
    estimator = (
        make_pipeline(StandardScaler(), LinearRegression()).set_output(transform="pandas").fit(np.eye(3), [1, 2, 3])
    )
    expected = estimator.predict(np.ones((1, 3)))[0]
    native = serve_estimator(tmp_path / "model.joblib", estimator)
    assert call(native, post_case({"x0": 1, "x1": 1, "x2": 1})).json["prediction"] == pytest.approx(expected)


@pytest.mark.parametrize("vectorizer", [DictVectorizer(), FeatureHasher(n_features=4)])
def test_dictionaries_are_no_rows(vectorizer: Any) -> None:
    """What takes dictionaries of any keys is refused with what to fit instead."""
    estimator = make_pipeline(vectorizer, LogisticRegression()).fit([{"a": 1}, {"b": 2}], [0, 1])
    with pytest.raises(ModelError, match="in it, which takes dictionaries; fit a ColumnTransformer on columns"):
        read_inputs(estimator)


def test_categories_that_json_has_not_are_refused() -> None:
    """An encoder of dates cannot be asked over JSON."""
    dates = pd.DataFrame({"a": pd.to_datetime(["2026-01-01", "2026-01-02"] * 2)})
    with pytest.raises(ModelError, match="has categories of the type datetime, which JSON does not have"):
        read_inputs(make_pipeline(OneHotEncoder(), Ridge()).fit(dates.to_numpy("datetime64[us]"), Y))


def test_dropped_columns_are_not_asked_for(tmp_path: Path) -> None:
    """What a ColumnTransformer drops is no feature, and the estimator gets the others in their places."""
    transformer = make_column_transformer((StandardScaler(), ["year"]), (OneHotEncoder(), ["island"]))
    estimator = make_pipeline(transformer, LogisticRegression()).fit(PENGUINS, SPECIES)
    row = {"island": "Dream", "year": 2008}
    expected = estimator.predict_proba(PENGUINS.head(1).assign(**row))[0].tolist()
    native = serve_estimator(tmp_path / "model.joblib", estimator)
    assert [*call(native, post_case(row)).json["probabilities"].values()] == pytest.approx(expected, rel=1e-12)
    assert "Unknown feature" in call(native, post_case(row | {"sex": "male"})).json["detail"][0]["msg"]


def lengths(texts: list[str]) -> Any:
    return np.array([[len(text)] for text in texts])


def lower(texts: list[str]) -> list[str]:
    return [text.lower() for text in texts]


@pytest.mark.parametrize(
    "vectorizer",
    [
        TfidfVectorizer(),
        CountVectorizer(),
        HashingVectorizer(n_features=8),
        make_union(TfidfVectorizer(), make_pipeline(FunctionTransformer(lengths))),
        make_pipeline(FunctionTransformer(lower), TfidfVectorizer()),
    ],
    ids=["tfidf", "count", "hashing", "union", "cleaned"],
)
@pytest.mark.parametrize("name", ["text", "review"])
def test_text_is_one_feature(tmp_path: Path, framework: str, vectorizer: Any, name: str) -> None:
    """A text classifier has one string feature, which the settings may name, and takes a list of texts."""
    estimator = GridSearchCV(make_pipeline(vectorizer, LogisticRegression()), {}, cv=2).fit(FILMS, Y)
    expected = estimator.predict_proba(["dull film", ""])
    features = {} if name == "text" else {name: {"example": "so so"}}
    native = serve_estimator(tmp_path / "model.joblib", estimator, framework=framework, features=features)
    answers = call(native, post_case([{name: "dull film"}, {name: ""}])).json
    np.testing.assert_allclose([[*answer["probabilities"].values()] for answer in answers], expected)
    assert call(native, Case("get", "GET", f"/predictions?{name}=dull+film")).json == answers[0]
    assert call(native, post_case({name: 1})).json["detail"][0]["msg"] == "Input should be a valid string"


def test_text_column_is_one_of_several(tmp_path: Path) -> None:
    """A vectorizer in a ColumnTransformer makes its column a string."""
    table = pd.DataFrame({"review": FILMS, "stars": [5, 1, 4, 2]})
    transformer = make_column_transformer((TfidfVectorizer(), "review"), (StandardScaler(), ["stars"]))
    estimator = make_pipeline(transformer, LogisticRegression()).fit(table, Y)
    expected = estimator.predict(table).tolist()
    answers = call(serve_estimator(tmp_path / "model.joblib", estimator), post_case(rows_of(table))).json
    assert [answer["prediction"] for answer in answers] == expected


BAD_CELLS: list[tuple[dict[str, Any], str, str]] = [
    ({"island": "Dreem"}, "literal_error", "Input is none of the choices; did you mean 'Dream'?"),
    ({"island": "Elba"}, "literal_error", "Input is none of the choices; use one of 'Biscoe', 'Dream', 'Torgersen'"),
    ({"island": 3}, "string_type", "Input should be a valid string"),
    ({"bill_length_mm": "39.1"}, "float_type", "Input should be a valid number"),
]


@pytest.fixture(scope="module")
def penguins_apps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The apps around the boosted trees, by framework."""
    path = tmp_path_factory.mktemp("penguins") / "model.joblib"
    return {name: serve_estimator(path, fitted("boosting")[0], framework=name) for name in app.FRAMEWORKS}


@pytest.fixture
def penguins(penguins_apps: dict[str, Any], framework: str) -> Any:
    return penguins_apps[framework]


@pytest.mark.in_turn
@pytest.mark.parametrize(("change", "kind", "message"), BAD_CELLS)
def test_bad_cell_is_named_among_many(penguins: Any, change: dict[str, Any], kind: str, message: str) -> None:
    """In 10 000 rows one wrong string, category or number is named by its row and feature."""
    rows = [rows_of(PENGUINS)[0]] * 10_000
    rows[7654] = rows[7654] | change
    (name, given), *_ = change.items()
    answer = call(penguins, post_case(rows))
    assert answer.status == 422
    assert answer.json["detail"] == [{"type": kind, "loc": ["body", 7654, name], "msg": message, "input": given}]


def test_query_leaves_out_what_is_missing(penguins: Any) -> None:
    """In a query a feature that may be missing can be left out or empty; an unknown category is named."""
    row = dict.fromkeys(PENGUINS) | {"island": "Dream", "year": 2008}
    expected = call(penguins, post_case(row)).json
    for query in ("island=Dream&year=2008", "island=Dream&year=2008&sex=&body_mass_g="):
        assert call(penguins, Case("get", "GET", f"/predictions?{query}")).json == expected
    problem = call(penguins, Case("get", "GET", "/predictions?island=Elba")).json["detail"][0]
    assert (problem["type"], problem["loc"], problem["input"]) == ("literal_error", ["query", "island"], "Elba")


def test_document_shows_choices_and_a_real_row(penguins: Any) -> None:
    """The OpenAPI document has the categories, null where it is allowed, and an example with its own answer."""
    document = call(penguins, Case("openapi", "GET", "/openapi.json")).json
    island = document["components"]["schemas"]["Features"]["properties"]["island"]
    assert island["anyOf"] == [{"enum": ISLANDS, "type": "string"}, {"type": "null"}]
    operation = document["paths"]["/predictions"]["post"]
    row = operation["requestBody"]["content"]["application/json"]["examples"]["one"]["value"]
    assert row["island"] == "Biscoe"
    answer = operation["responses"]["200"]["content"]["application/json"]["examples"]["one"]["value"]
    assert answer == call(penguins, post_case(row)).json
    parameters = document["paths"]["/predictions"]["get"]["parameters"]
    assert [parameter["required"] for parameter in parameters] == [False] * 7


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"island": {"type": "float"}}, "features.island.type is 'float'; the model takes 'str' there"),
        ({"year": {"type": "str"}}, "features.year.type is 'str'; the model takes 'float' there"),
        ({"year": {"missing": True}}, "features.year.missing is True; the model takes no missing value there"),
        (
            {"island": {"choices": ["Elba"]}},
            "features.island.choices is ['Elba']; the model takes only 'Biscoe', 'Dream'",
        ),
        ({"island": {"choices": ["Dream", 1]}}, "features.island.choices is ['Dream', 1]; the model takes only"),
        ({"island": {"ge": 1}}, "features.island.ge is 1.0; the model takes only 'Biscoe', 'Dream', 'Torgersen' there"),
        (
            {"year": {"choices": [2007, "a"]}},
            "features.year does not fit the model: it should have the type 'float', unlike",
        ),
        ({"year": {"example": "a"}}, "features.year.example is 'a'; it should be a valid number"),
        ({"island": {"example": "Elba"}}, "features.island.example is 'Elba'; it should be one of 'Biscoe', 'Dream'"),
        ({"sex": {}}, "features.sex is not about a feature of the model; use one of 'island', 'year'"),
    ],
    ids=str,
)
def test_contradiction_is_refused(features: dict[str, Any], message: str) -> None:
    """Where settings and estimator contradict each other, a message names the setting, its value and what is taken."""
    transformer = make_column_transformer((StandardScaler(), ["year"]), (OneHotEncoder(), ["island"]))
    estimator = make_pipeline(transformer, LogisticRegression()).fit(PENGUINS, SPECIES)
    with pytest.raises(SettingsError) as caught:
        contract_of(estimator, **features)
    assert message in str(caught.value)


def test_contradictions_are_told_together() -> None:
    """All contradictions are in one message, a line each."""
    wrong = {"island": {"type": "int"}, "sex": {"type": "bool", "choices": [True]}, "year": {"type": "str"}}
    with pytest.raises(SettingsError) as caught:
        contract_of(fitted("boosting")[0], **wrong)
    assert len(str(caught.value).splitlines()) == 4


def test_settings_narrow_what_the_estimator_takes() -> None:
    """Fewer choices, bounds, a narrower type and no null are the operator's to ask for."""
    narrow = {"island": {"choices": ["Dream"], "missing": False}, "year": {"type": "int", "ge": 2007, "missing": False}}
    contract = contract_of(fitted("boosting")[0], **narrow)
    row = rows_of(PENGUINS)[200] | {"island": "Dream", "year": 2007}
    assert len(contract.parse_payload([row])) == 1
    for change in ({"island": "Biscoe"}, {"island": None}, {"year": 2006}, {"year": 2007.5}, {"year": None}):
        with pytest.raises(Unprocessable):
            contract.parse_payload([row | change])


@pytest.mark.parametrize(
    ("choices", "good", "bad"),
    [([1, 2], 1, 3), ([1, 2], 2, True), ([1, 2], 1, 1.5), ([0.5, 2.5], 0.5, 1), ([0.5, 2.0], 2, "2")],
)
def test_choices_of_numbers_are_held_to(choices: list[Any], good: Any, bad: Any) -> None:
    """A number is a choice by its value, true is none, and a query's text is parsed first."""
    estimator = LinearRegression().fit(COUNTS, Y)
    kind = "int" if all(isinstance(choice, int) for choice in choices) else "float"
    contract = contract_of(estimator, a={"choices": choices, "type": kind})
    assert contract.parse_payload({"a": good, "b": 1}) == contract.parse_query(f"a={good}&b=1")
    with pytest.raises(Unprocessable) as caught:
        contract.parse_payload([{"a": good, "b": 1}, {"a": bad, "b": 1}])
    assert caught.value.detail[0]["loc"] == ["body", 1, "a"]
    described = Draft202012Validator(describe_cell("a", contract.features["a"]))
    assert all(map(described.is_valid, [good, *choices]))
    assert not described.is_valid(bad)


def test_missing_is_tried_at_the_start(tmp_path: Path) -> None:
    """Where nobody can say whether null is taken, it is tried before the service starts."""
    estimator = make_pipeline(FunctionTransformer(np.asarray), LogisticRegression()).fit(COUNTS, Y)
    with pytest.raises(ModelError, match=r"fails on a missing 'b'; set features.b.missing = false: ValueError"):
        serve_estimator(tmp_path / "model.joblib", estimator, features={"b": {"missing": True}})


def test_parts_without_a_category_in_common_are_refused() -> None:
    """Where each value fails in one part or another there is nothing to serve."""
    encoders = make_union(OneHotEncoder(categories=[["x"]]), OneHotEncoder(categories=[["y"]]))
    for (_, encoder), value in zip(encoders.transformer_list, "xy", strict=True):
        encoder.fit(pd.DataFrame({"a": [value]}))
    estimator = make_pipeline(encoders, LogisticRegression())
    estimator.steps[-1][1].fit(np.eye(2), [0, 1])
    with pytest.raises(ModelError, match="has parts that know no category of 'a' in common"):
        contract_of(estimator, a={})


def test_odd_names_are_refused() -> None:
    """Names that are not one for each feature are no contract."""
    estimator = LinearRegression().fit(COUNTS, Y)
    for names in (["a"], ["a", "a"]):
        estimator.feature_names_in_ = np.array(names, dtype=object)
        with pytest.raises(ModelError, match="names for 2 features"):
            read_inputs(estimator)


def test_estimator_of_another_version_is_refused() -> None:
    """What scikit-learn keeps otherwise in another version ends in a message, not in a traceback."""
    estimator, _ = ESTIMATORS["boosting"]()
    del estimator[0]._transformer_to_input_indices
    with pytest.raises(ModelError, match=r"is not as this version of scikit-learn fits it: .*_transformer_to_input"):
        read_inputs(estimator)


def test_wide_model_answers_in_bounded_time_and_length() -> None:
    """With a thousand features or categories, a thousand bad cells are answered soon, and a message lists a few."""
    X = np.array([f"category {number}" for number in range(1000)], dtype=object).reshape(-1, 1)
    contract = contract_of(make_pipeline(OneHotEncoder(), LogisticRegression()).fit(X, np.arange(1000) % 2))
    wide = contract_of(LinearRegression().fit(np.eye(1000), np.arange(1000)))
    for payload, checked in (
        ([{"x0": f"categorie {number}"} for number in range(1000)], contract),
        ({f"y{number}": 1 for number in range(1000)}, wide),
    ):
        with pytest.raises(Unprocessable) as caught:
            checked.parse_payload(payload)
        assert len(Response.of(caught.value.detail, 422).pieces[0]) < 10**6


WITHOUT_PANDAS = """
import sys

class Hidden:
    @staticmethod
    def find_spec(name, *others):
        if name == "pandas":
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Hidden)
import app
app.native
print("served")
"""


@pytest.mark.parametrize("name", ["iris", "numbers", "boosting"])
def test_pandas_is_there_only_where_it_is_needed(tmp_path: Path, name: str) -> None:
    """Numbers are served without pandas; where a DataFrame is needed and pandas is not there, the message says how."""
    environment = {} if name == "iris" else {"SERVING_SETTINGS": deploy(tmp_path, fitted(name)[0])}
    command = [sys.executable, "-c", WITHOUT_PANDAS]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    if name == "boosting":
        assert "install pandas: pip install -r requirements-pandas.txt" in done.stderr
    else:
        assert done.stdout == "served\n", done.stderr
