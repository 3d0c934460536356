"""What a refusal costs and says: however a request is made, its answer is short, and so is the work for it."""

import contextlib
import difflib
import gc
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jiter
import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

import app
from serving.errors import LIKELY_NAMES, Unprocessable, nearest
from serving.predictor.bodies import QUICK_BYTES, collector_off
from serving.predictor.contract import MAX_DETAIL_BYTES, MAX_HINTS, MAX_PROBLEMS, Contract
from serving.predictor.inputs import read_inputs
from serving.web import documentation
from tests.lib.apps import call, make_service, make_settings
from tests.lib.artifacts import deploy
from tests.lib.cases import FLOWER, JSON, QUERY, Case, get, post
from tests.lib.clients import post_case
from tests.lib.load import Load
from tests.lib.servers import Starter, gunicorn_environment
from tests.lib.sizes import each_worker, scale

MOST_BYTES = MAX_DETAIL_BYTES + len('{"detail":[]}')
LONG = 2_000_000
DEEP = "[" * 90 + "]" * 90
NAMES = [f"{'n' * 91}_{number:04}" for number in range(200)]  # as long as names that are compared may be
NEAR = {f"{'n' * 90}_x{number:04}": 1 for number in range(1000)}
CHOICES = [f"{'c' * 75}_{number:04}" for number in range(300)]


def make_named(names: list[str]) -> LinearRegression:
    return LinearRegression().fit(pd.DataFrame(np.eye(2, len(names)), columns=names), [1.0, 2.0])


def make_choosing() -> Any:
    columns = make_column_transformer((OneHotEncoder(), ["text"]))
    estimator = make_pipeline(columns, LinearRegression())
    return estimator.fit(pd.DataFrame({"text": CHOICES}), np.arange(300.0))


MODELS: dict[str, Callable[[], Any]] = {
    "long": lambda: make_named(NAMES),
    "longest": lambda: make_named([f"{number:05}{'n' * 9_995}" for number in range(5000)]),
    "unprintable": lambda: make_named([f"{number:05}{chr(1) * 995}" for number in range(100)]),
    "choosing": make_choosing,
}


@pytest.fixture(scope="module")
def apps() -> dict[tuple[str, str], Any]:
    """An app of each framework around each of the models, and around the shipped one."""
    found: dict[tuple[str, str], Any] = {}
    for name, make in MODELS.items():
        service = make_service(make_settings(features={}), make())
        found |= {(framework, name): build(service) for framework, build in app.FRAMEWORKS.items()}
    iris = app.make_service(make_settings())
    return found | {(framework, "iris"): build(iris) for framework, build in app.FRAMEWORKS.items()}


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Each name that is looked up, with the number of those that it is compared with."""
    noted: list[tuple[str, int]] = []
    look_up = difflib.get_close_matches

    def note(name: str, names: list[str], n: int) -> list[str]:
        noted.append((name, len(names)))
        return look_up(name, names, n)

    monkeypatch.setattr(difflib, "get_close_matches", note)
    return noted


@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("model", "payload", "message"),
    [
        ("long", NEAR, "Unknown feature"),
        ("long", [NEAR] * 3, "Unknown feature"),
        (
            "choosing",
            [{"text": f"{choice}?{n}"} for n in range(3) for choice in CHOICES],
            "Input is none of the choices",
        ),
    ],
    ids=["names", "rows-of-names", "choices"],
)
def test_suggestions_are_for_the_first_problems(
    apps: dict[tuple[str, str], Any],
    compared: list[tuple[str, int]],
    framework: str,
    model: str,
    payload: Any,
    message: str,
) -> None:
    """Of hundreds of wrong names ten are looked up, each beside a few of hundreds; the others are only named."""
    problems = call(apps[framework, model], post_case(payload)).json["detail"]
    messages = [problem["msg"] for problem in problems if problem["msg"].startswith(message)]
    assert len(messages) > 100
    assert all("did you mean" in said for said in messages[:MAX_HINTS])
    assert {*messages[MAX_HINTS:]} == {message}
    assert 0 < len(compared) <= MAX_HINTS
    assert {count for _, count in compared} == {LIKELY_NAMES}


def test_name_is_looked_up_once(
    apps: dict[tuple[str, str], Any], compared: list[tuple[str, int]], framework: str
) -> None:
    """A name that is wrong in each row gets its suggestion in the first ones, for one comparison."""
    bad = json.loads(FLOWER.replace("petal_width", "petal_widht"))
    messages = [problem["msg"] for problem in call(apps[framework, "iris"], post_case([bad] * 50)).json["detail"]]
    unknown = [message for message in messages if message.startswith("Unknown")]
    assert unknown == ["Unknown feature; did you mean 'petal_width'?"] * 10 + ["Unknown feature"] * 40
    assert compared == [("petal_widht", 4)]


@pytest.mark.parametrize("damage", ["{0}s", "X{0}", "{1}", "X{1}X"], ids=["longer", "start", "inside", "all-over"])
def test_suggestion_is_found_among_many(damage: str) -> None:
    """Of long names only some are compared, and the nearest is among them, wherever the slip is."""
    names = [
        f"region_{place}_of_{count}_customers_in_{count * place}_days" for place in range(10) for count in range(20)
    ]
    for name in names[::7]:
        wrong = damage.format(name, name.replace("customers", "custmers"))
        assert nearest(wrong, names) == f"did you mean {name!r}?"


def json_case(id: str, payload: Any, status: int = 422) -> Case:
    return post(id, json.dumps(payload), status)


def json_array(item: str, count: int) -> str:
    return f"[{','.join([item] * count)}]"


def header(id: str, name: str, value: str, status: int = 415) -> Case:
    return Case(id, "POST", "/predictions", ((name, value),) + (JSON if name != "Content-Type" else ()), b"{}", status)


TWICE = post("long-name-twice", f'{{"{"n" * (LONG // 2)}":1,"{"n" * (LONG // 2)}":1}}', 400)
HOSTILE = [
    json_case("long-text", "x" * LONG),
    json_case("long-cell", {"sepal_length": "x" * LONG}),
    json_case("long-control-characters", {"sepal_length": "\1" * (LONG // 6)}),
    json_case("long-array", {"sepal_length": [0] * (LONG // 3)}),
    json_case("long-object", {"sepal_length": {f"{'k' * 1000}{number}": "v" * 1000 for number in range(1000)}}),
    json_case("long-name", {"n" * LONG: 1}),
    json_case("long-names", {f"{'n' * 5000}{number}": "v" * 1000 for number in range(1000)}),
    json_case("many-names", {f"n{number}": 1 for number in range(150_000)}),
    json_case("many-names-of-a-row", [{f"n{number}": 1 for number in range(150_000)}]),
    json_case("near-names", NEAR),
    json_case("many-values", {"a": [[["x" * 199] * 20] * 20] * 20}),
    json_case("empty-object", {}),
    json_case("empty-rows", [{}] * 10_000),
    json_case("rows-of-long-cells", [{"sepal_length": "x" * 1000, "text": "x" * 1000} for _ in range(4000)]),
    json_case("rows-of-names", [{f"n{number}": 1 for number in range(900)}] * 500),
    post("rows-of-arrays", json_array(json_array("[1]", 1000), 1000), 422),
    post("long-integers", json_array(f'{{"sepal_length":1{"0" * 4000}}}', 2000), 422),
    post("lists", json_array("[]", LONG // 3), 413),
    post("lines", " \n" * (LONG // 2) + "x", 400),
    post("deep-lists", json_array(DEEP, LONG // 181), 413),
    post("deep-cell", f'{{"sepal_length":{json_array(DEEP, LONG // 181)}}}', 422),
    TWICE,
    get("query-of-names", "&".join(f"n{number}" for number in range(1000, 2300)), 422),
    get("query-of-short-names", "&".join(map(quote, map(chr, range(0x4E00, 0x4E00 + 800)))), 422),
    get("query-of-a-long-name", "n" * 8000, 422),
    get("query-of-a-long-value", "sepal_length=" + "1" * 8000, 422),
    get("query-of-long-names-twice", f"{'n' * 3900}&{'n' * 3900}", 422),
    get("query-of-one-name", "&".join(["a"] * 4000), 422),
    get("query-of-names-twice", "&".join([f"n{number}" for number in range(1000, 1600)] * 2), 422),
    header("long-content-type", "Content-Type", "x" * 8000),
    header("long-charset", "Content-Type", "application/json; charset=" + "x" * 8000),
    header("long-encoding", "Content-Encoding", "x" * 8000),
    header("long-length", "Content-Length", "x" * 8000, 400),
    Case("long-path", "GET", "/" + "p" * 8000, status=404),
    Case("long-encoded-path", "GET", "/" + "%01" * 2600, status=404),
    Case("long-method", "M" * 8000, "/predictions", status=405),
]


@pytest.mark.parametrize("model", ["iris", *MODELS])
@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.id)
def test_answer_is_bounded(apps: dict[tuple[str, str], Any], model: str, case: Case) -> None:
    """Whatever is sent to whichever model, the answer has the shape of others and at most 128 kB."""
    answers = [call(apps[framework, model], case) for framework in app.FRAMEWORKS]
    assert answers[0] == answers[1]
    assert answers[0].status == case.status
    assert len(answers[0].body) <= MOST_BYTES
    detail = answers[0].json["detail"]
    if case.status != 422:
        assert len(answers[0].body) < 3000
        return
    assert 1 <= len(detail) <= MAX_PROBLEMS
    assert all(problem.keys() == {"type", "loc", "msg", "input"} for problem in detail)


def test_answer_has_all_problems_that_it_has_room_for(apps: dict[tuple[str, str], Any], framework: str) -> None:
    """The thousand that an answer may name are there, unless they are long; of long ones as many as fit."""
    few = call(apps[framework, "iris"], json_case("rows", [{}] * 10_000))
    assert len(few.json["detail"]) == MAX_PROBLEMS
    long = call(apps[framework, "long"], json_case("rows", [{}] * 10_000))
    one = len(json.dumps(long.json["detail"][0], separators=(",", ":")))
    assert MOST_BYTES - 2 * one < len(long.body) <= MOST_BYTES


def test_problem_longer_than_an_answer_may_be_is_named() -> None:
    """Names of features are whole, so that one problem may be as long as the name is, and comes alone."""
    contract = Contract(read_inputs(make_named(["a" * 200_000, "b"])), {})
    with pytest.raises(Unprocessable) as refusal:
        contract.parse_payload([{}, {}])
    assert [problem["loc"] for problem in refusal.value.detail] == [["body", 0, "a" * 200_000]]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("x" * 200, "x" * 200),
        ("a" * 150 + "b" * 8_000_000 + "c" * 49, "a" * 150 + "…" + "c" * 49),
        (10**199, 10**199),
        (-(10**4000), "-1" + "0" * 148 + "…" + "0" * 49),
        (True, True),
        (1.5, 1.5),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
        ([*range(1000)], [0, 1, 2, 3, 4, 5, "…"]),
        (["x" * 101], ["x" * 75 + "…" + "x" * 24]),
        ({"value": 0.2, "unit": {"cm": [None]}}, {"value": 0.2, "unit": {"cm": [None]}}),
        ({f"k{n}": n for n in range(7)}, {"k0": 0, "k1": 1, "k2": 2, "k3": 3, "k4": 4, "k5": 5, "…": "…"}),
        ({"k" * 201: 0}, {"k" * 75 + "…" + "k" * 24: 0}),
        ([[[[1]]]], [[["…"]]]),
        ([[[[]]]], [[[[]]]]),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_input_is_shortened(apps: dict[tuple[str, str], Any], framework: str, given: Any, shown: Any) -> None:
    """What was given is repeated as it was, but for the middle of a text, later items and what is far inside."""
    payload = json.loads(FLOWER) | {"sepal_length": given}
    if isinstance(given, float):
        payload = [[given]]
        shown = [shown]
    answer = call(apps[framework, "iris"], json_case("given", payload))
    assert [problem["input"] for problem in answer.json["detail"]] == [shown]


@pytest.mark.parametrize(
    "payload", [{"instances": [{}]}, [[1, 2]] * 1000, [1.0] * 1000, {"n" * 91 + "_0000": [1]}, "x"]
)
def test_another_shape_is_one_problem(apps: dict[tuple[str, str], Any], framework: str, payload: Any) -> None:
    """A body that is no rows at all gets one problem, which shows a row, of one with many features the first ones."""
    (problem,) = call(apps[framework, "long"], json_case("shape", payload)).json["detail"]
    _, _, sample = problem["msg"].partition("such as ")
    row = json.loads(sample.strip("[]"))
    assert len(row) == 7
    assert [*row.values()] == [0.0] * 6 + ["…"]


def test_names_of_features_are_whole_and_others_are_not(apps: dict[tuple[str, str], Any], framework: str) -> None:
    """In `loc` a feature has its name, however long; a name of the client's own is shortened."""
    native, name = apps[framework, "unprintable"], f"00000{chr(1) * 995}"
    row = {f"{number:05}{chr(1) * 995}": 1 for number in range(100)}
    answer = call(native, json_case("names", row | {name: "x", "n" * 1000: 1}))
    assert [problem["loc"] for problem in answer.json["detail"]] == [
        ["body", name],
        ["body", "n" * 150 + "…" + "n" * 49],
    ]


@pytest.mark.parametrize(
    ("case", "detail"),
    [
        (TWICE, 'the body is not JSON: Detected duplicate key "nnn…nnn" at line 1 column 2000010'),
        (Case("path", "GET", "/" + "p" * 1000 + "/x"), "there is no '/ppp…ppp/x'; use one of '/predictions', '/ping'"),
        (
            header("type", "Content-Type", "text/" + "x" * 1000),
            "Content-Type is 'text/xxx…xxx'; use 'application/json'",
        ),
        (
            header("encoding", "Content-Encoding", "x" * 1000),
            "Content-Encoding is 'xxx…xxx'; use one of 'gzip', 'deflate', or send the body as it is",
        ),
        (header("length", "Content-Length", "1" * 1000), "Content-Length is '111…111'; it should be a number of bytes"),
        (Case("method", "M" * 1000, "/ping"), "MMM…MMM is not allowed on /ping; use one of GET, HEAD, OPTIONS"),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else "",
)
def test_messages_keep_the_ends_of_what_they_quote(
    apps: dict[tuple[str, str], Any], framework: str, case: Case, detail: str
) -> None:
    """A message that quotes a long text has its start and its end, and all that the message says around it."""
    said = call(apps[framework, "iris"], case).json["detail"]
    assert re.sub(r"([a-zM1])\1{3,}", r"\1\1\1", said).startswith(detail)
    assert len(said) < 400


@pytest.fixture
def collections_noted() -> Iterator[list[int]]:
    """The generations that the garbage collector has gone through."""
    noted: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            noted.append(info["generation"])

    gc.callbacks.append(note)
    yield noted
    gc.callbacks.remove(note)


@pytest.mark.in_turn
@pytest.mark.parametrize("id", ["lists", "deep-lists", "deep-cell", "rows-of-arrays", "many-names"])
def test_collector_keeps_from_a_long_body(
    apps: dict[tuple[str, str], Any], collections_noted: list[int], framework: str, id: str
) -> None:
    """Millions of objects are decoded and dropped without a search for garbage among them, and it is on again."""
    case = next(case for case in HOSTILE if case.id == id)
    gc.collect()
    collections_noted.clear()
    assert call(apps[framework, "iris"], case).status == case.status
    assert len(collections_noted) < 20  # of the other objects of a request; there would be thousands
    assert gc.isenabled()


@pytest.mark.parametrize("was_on", [True, False])
def test_collector_is_as_it_was(was_on: bool) -> None:
    """What decoding fails with leaves the collector as its user has it."""
    (gc.enable if was_on else gc.disable)()
    try:
        with contextlib.suppress(KeyError), collector_off():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is was_on
    finally:
        gc.enable()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of each text that is decoded."""
    lengths: list[int] = []
    decode = jiter.from_json

    def note(body: bytes, **options: Any) -> Any:
        lengths.append(len(body))
        return decode(body, **options)

    monkeypatch.setattr(jiter, "from_json", note)
    return lengths


@pytest.mark.parametrize("model", ["iris", "choosing"])
@pytest.mark.parametrize("case", [case for case in HOSTILE if case.method == "POST"], ids=lambda case: case.id)
def test_body_is_decoded_twice_at_most(
    apps: dict[tuple[str, str], Any], decoded: list[int], model: str, case: Case
) -> None:
    """Beside the whole, only pieces of what looks like rows are decoded, each up to twice, until one does not fit."""
    assert call(apps["flask", model], case).status == case.status
    assert sum(decoded) <= len(case.body) + 4 * QUICK_BYTES
    assert sorted(decoded)[:-1] == [length for length in sorted(decoded)[:-1] if length <= QUICK_BYTES]


def test_long_rows_are_still_read_in_pieces(apps: dict[tuple[str, str], Any], decoded: list[int]) -> None:
    """Rows of a hundred kilobytes each make pieces."""
    row = dict.fromkeys([f"{number:05}{chr(1) * 995}" for number in range(100)], 0.5)
    answer = call(apps["flask", "unprintable"], post_case([row] * 10))
    assert (answer.status, len(answer.json)) == (200, 10)
    assert len(decoded) >= 10


@each_worker()
def test_hostile_bodies_hold_nobody_up(serve: Starter, tmp_path: Path, combination: tuple[str, str]) -> None:
    """While such bodies come in a loop, another client's pings and predictions are answered, by the same worker."""
    file = deploy(tmp_path, make_named(NAMES))
    environment = {"SERVING_SETTINGS": file, "SERVING_LIMITS__REQUEST_TIMEOUT_S": "60"}  # on a busy core, too
    server = serve(**gunicorn_environment(*combination, **environment))
    workers = server.worker_pids
    ids = ("near-names", "long-text", "deep-lists", "many-names")
    loads = [Load(server, case, clients=1) for case in HOSTILE if case.id in ids]
    with loads[0], loads[1], loads[2], loads[3]:
        for _ in range(scale(2, 10)):
            assert server.get("/ping").status == 200
            assert server.post(dict.fromkeys(NAMES, 0.5)).status == 200
        for load in loads:
            load.wait_for(scale(1, 2))
    assert [load.failures for load in loads] == [[]] * 4
    assert [{*load.answers} for load in loads] == [{422}, {422}, {422}, {413}]
    assert server.worker_pids == workers
    server.stop()


@each_worker()
def test_client_that_never_reads_holds_no_answer(serve: Starter, combination: tuple[str, str]) -> None:
    """What is said of 8 MB fits in the kernel's buffers, so that a worker ends although nobody reads it."""
    server = serve(**gunicorn_environment(*combination))
    clients = [server.connect() for _ in range(10)]
    for client in clients:
        client.sendall(json_case("long-text", "x" * 8_000_000).raw())
    for client in clients:
        assert client.recv(1) == b"H"  # and no more of it
    assert server.stop() == 0
    assert "drain_cut_short" not in server.text
    for client in clients:
        client.close()


def test_query_example_is_as_ever(apps: dict[tuple[str, str], Any], framework: str) -> None:
    """A single bad cell has its message, its place and its value, as short ones have had."""
    answer = call(apps[framework, "iris"], get("query", QUERY.replace("0.2", "wide") + "&petal=1", 422))
    assert answer.json["detail"] == [
        {
            "type": "float_parsing",
            "loc": ["query", "petal_width"],
            "msg": "Input should be a valid number, unable to parse string as a number",
            "input": "wide",
        },
        {
            "type": "extra_forbidden",
            "loc": ["query", "petal"],
            "msg": "Unknown feature; did you mean 'petal_width'?",
            "input": "1",
        },
    ]


@pytest.mark.parametrize("text", ["1_0", "_1", "1_0.5"])
def test_underscores_are_no_part_of_a_number(apps: dict[tuple[str, str], Any], framework: str, text: str) -> None:
    """They are to Python and pydantic, which would make ten of `1_0`, and in no format that a client writes."""
    query = call(apps[framework, "iris"], get("query", QUERY.replace("0.2", text), 422))
    (problem,) = query.json["detail"]
    assert (problem["type"], problem["loc"], problem["input"]) == ("float_parsing", ["query", "petal_width"], text)
    lines = f"{','.join(json.loads(FLOWER))}\n5.1,3.5,1.4,{text}\n".encode()
    csv = call(apps[framework, "iris"], Case("csv", "POST", "/invocations", (("Content-Type", "text/csv"),), lines))
    (problem,) = csv.json["detail"]
    assert (problem["type"], problem["loc"], problem["input"]) == ("float_parsing", ["body", 2, "petal_width"], text)


def test_document_is_rendered_once(
    apps: dict[tuple[str, str], Any], framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The document of a model of many features is long, and a request for it is short: it is rendered for the first."""
    case = Case("openapi", "GET", "/openapi.json")
    first = call(apps[framework, "long"], case)
    rendered: list[Any] = []
    render = documentation.to_json

    def note(value: Any, **options: Any) -> bytes:
        rendered.append(value)
        return render(value, **options)

    monkeypatch.setattr(documentation, "to_json", note)
    assert call(apps[framework, "long"], case) == first
    assert not [value for value in rendered if "openapi" in value]
    assert first.json["openapi"] == "3.1.0"
