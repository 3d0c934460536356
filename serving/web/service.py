"""The service: from a request to its operation, and to a response whatever happens. It knows no framework."""

from __future__ import annotations

import contextlib
import functools
import hmac
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Protocol, TypeVar

import structlog
from pydantic import AfterValidator, Field, PositiveInt, SecretStr

from serving.errors import (
    ClientLeft,
    ContentTooLarge,
    InternalError,
    MethodNotAllowed,
    NotFound,
    ServingError,
    Unauthorized,
    nearest,
    shorten,
)
from serving.logs import REQUEST_ID
from serving.predictor.artifact import ModelSettings
from serving.predictor.calls import BatchingSettings, BatchQueue, CallCost, Job
from serving.predictor.model import Model
from serving.predictor.proof import Proof
from serving.server import ServerSettings
from serving.settings import OtherNames, SettingsTable, check_each_once
from serving.web.cors import CORS
from serving.web.encodings import IDENTITY, SMALL_BODY_BYTES, encoding_of, inflate
from serving.web.messages import SANE_REQUEST_ID, Request, Response, Rest, make_request_id, write_detail
from serving.web.operation import Endpoint, Operation

log = structlog.get_logger()
VARIABLE = re.compile(r"[<>{}]")  # in a path that a framework would take for a pattern: it gets no route of its own
WHOLE_ANSWER = 2  # times the limit of a body that an answer may have which is not streamed
VISIT = "serving.visit"  # in a scope or an environ: the `Visit` that a request is
STOPPING = threading.Event()  # set once this process ends, and no other takes over from it


class LimitSettings(SettingsTable):
    """The limits of a request, and of what may wait."""

    other_names: ClassVar[OtherNames] = {
        "max_body_bytes": ("max_content_length",),
        "request_timeout_s": ("timeout", "request_timeout"),
    }

    max_body_bytes: PositiveInt = 8_388_608
    max_rows: PositiveInt = 10_000
    max_queued_rows: PositiveInt = 10_000
    request_timeout_s: Annotated[float, Field(ge=0.1, le=86_400)] = 10.0


def _check_key(key: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[^\s\ud800-\udfff]+", key.get_secret_value()):
        raise ValueError("a key should be text without white space")
    return key


APIKey = Annotated[SecretStr, AfterValidator(_check_key)]


def _check_open_path(path: str) -> str:
    if not re.fullmatch(r"/[^\s?#%*]*|/(?:[^\s?#%*]*/)?\*", path):
        rule = "a path should begin with '/', have no '?', '#' or '%', and '*' only in '/*' at its end"
        raise ValueError(f"{rule}, unlike {shorten(path)!r}")
    return path


class AuthSettings(SettingsTable):
    """The keys of those who may ask."""

    secret_keys = ("api_keys",)
    other_names: ClassVar[OtherNames] = {"api_keys": ("keys", "key", "token", "tokens")}

    api_keys: Annotated[list[APIKey], AfterValidator(check_each_once)] = Field(default_factory=list)
    open_docs: bool = False
    open_paths: list[Annotated[str, AfterValidator(_check_open_path)]] = Field(default_factory=list)


class ServiceSettings(Protocol):
    """The tables of the settings that a service reads."""

    @property
    def server(self) -> ServerSettings: ...
    @property
    def model(self) -> ModelSettings: ...
    @property
    def batching(self) -> BatchingSettings: ...
    @property
    def limits(self) -> LimitSettings: ...
    @property
    def auth(self) -> AuthSettings: ...
    @property
    def sha256(self) -> str: ...


S = TypeVar("S", bound=ServiceSettings)


@dataclass(slots=True)
class Exchange:
    """A request that was answered."""

    request: Request  # with its job, if it was one for predictions
    response: Response
    operation: Operation | None  # None where no operation has the request's path and method
    began: float  # by `time.perf_counter`
    took_s: float


Observer = Callable[[Exchange], None]


class AccessLog:
    """Logs each exchange. An observer."""

    @functools.cached_property
    def _log(self) -> Any:
        return log.bind()  # once, for a proxy would do it for each line; but not before logging is configured

    def __call__(self, exchange: Exchange) -> None:
        self._log.info(
            "request",
            method=exchange.request.method,
            path=exchange.request.path,
            status=exchange.response.status,
            duration_ms=round(exchange.took_s * 1000, 3),
            rows=exchange.request.rows,
        )


class Visit:
    """A request that what a user has added may answer: it has one id all the way, and observers are shown it once.

    It goes along in the request's scope or environ, as `VISIT`: a request that is made inside another has its own.
    """

    def __init__(self, service: Service[Any], request: Request) -> None:
        self.service, self.request = service, request
        self.began = time.perf_counter()
        self.request_id = request_id_of(request)
        self.is_shown = False

    def __enter__(self) -> Visit:
        self._token = REQUEST_ID.set(self.request_id)
        return self

    def __exit__(self, *_: object) -> None:
        REQUEST_ID.reset(self._token)

    def note(self, status: int) -> bool:
        """Show an answer that begins to the observers, unless the service itself gave it. Return whether it did not."""
        if self.is_shown:
            return False
        self.is_shown = True
        response = Response([], status, request_id=self.request_id)
        took_s = time.perf_counter() - self.began
        token = REQUEST_ID.set(self.request_id)  # again, for a WSGI app may begin its answer after it has returned
        self.service.show(Exchange(self.request, response, None, self.began, took_s))
        REQUEST_ID.reset(token)
        return True


class ShownAtEnd:
    """The rest of an answer, whose exchange is shown to the observers when it ends, or is closed before."""

    def __init__(self, service: Service[Any], exchange: Exchange, rest: Rest) -> None:
        self._service, self._exchange, self._rest = service, exchange, rest
        self._has_ended = False

    def __aiter__(self) -> ShownAtEnd:
        return self

    async def __anext__(self) -> bytes:
        token = REQUEST_ID.set(self._exchange.response.request_id)
        try:
            return await anext(self._rest)
        except StopAsyncIteration:
            self._end()
            raise
        except ClientLeft:
            self._end(ClientLeft.status)
            raise StopAsyncIteration from None
        finally:
            REQUEST_ID.reset(token)

    async def aclose(self) -> None:
        """End it, if it has not ended: nobody takes the rest."""
        await self._rest.aclose()
        token = REQUEST_ID.set(self._exchange.response.request_id)
        self._end(ClientLeft.status)
        REQUEST_ID.reset(token)

    def _end(self, status: int | None = None) -> None:
        if not self._has_ended:
            self._has_ended = True
            exchange = self._exchange
            exchange.response.status = status or exchange.response.status
            exchange.took_s = time.perf_counter() - exchange.began
            self._service.show(exchange)


def request_id_of(request: Request) -> str:
    """Return the id that the caller has given, if it is sane, or else a new one."""
    given = request.header("x-request-id")
    return given if given and SANE_REQUEST_ID.fullmatch(given) else make_request_id()


def _is_below(path: str, scope: str) -> bool:
    return f"{path}/".startswith(f"{scope}/")


class Service(Generic[S]):
    """What the two frameworks share: a proven model behind a table of operations. Observers see each exchange."""

    def __init__(
        self,
        settings: S,
        model: Model,
        proof: Proof,
        operations: Iterable[Operation],
        observers: Iterable[Observer] = (),
    ) -> None:
        self.settings = settings
        self.model, self.proof = proof.applied_to(model), proof
        self.operations = [*operations]
        self.observers = [*observers]
        self.root_path, self.cors = settings.server.root_path, CORS.of(settings.server.cors_origins)
        self.made_once: dict[str, Any] = {}  # what operations make of it for the first request
        self.added_paths: Callable[[], Iterable[str]] = tuple  # those of a user's routes, for the hints of a 404
        self.routes: dict[str, dict[str, Operation]] = {}
        self.names: dict[str, str] = {}  # of the frameworks' routes, by path
        self.hot: dict[str, set[str]] = {}  # methods that are answered in front of the router, by path
        for operation in [one for one in self.operations if not one.only_for]:
            self.routes.setdefault(operation.path, {})[operation.method] = operation
            if not VARIABLE.search(operation.path):
                self.names.setdefault(operation.path, operation.name)
            if operation.is_hot:
                methods = {operation.method, "HEAD"} if operation.method == "GET" else {operation.method}
                self.hot.setdefault(operation.path, set()).update(methods)
        self._secured = {operation for operation in self.operations if operation.needs_key(settings.auth)}
        self._keys = [key.get_secret_value().encode() for key in settings.auth.api_keys]
        self._open_paths = {*settings.auth.open_paths}
        self._open_folders = tuple(path[:-1] for path in settings.auth.open_paths if path.endswith("/*"))
        limits, batching = settings.limits, settings.batching
        self.queue = BatchQueue(
            self.model.predict_rows,
            self.model.predict,
            max_rows=batching.max_rows,
            max_wait_s=batching.max_wait_ms / 1000,
            max_queued_rows=limits.max_queued_rows,
            timeout_s=limits.request_timeout_s,
            can_share=proof.never_batched is None,
            cost=CallCost(proof.call_s, proof.row_s),
        )

    @functools.cached_property
    def _asides(self) -> list[Operation]:
        return [one for one in self.operations if one.only_for]

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What is served: the model's name and the hashes of artifact and settings, for readiness and the log."""
        hashes = {"model_sha256": self.model.sha256, "settings_sha256": self.settings.sha256}
        return {"model": self.settings.model.name, **hashes}

    async def respond(
        self, request: Request, refused: Unauthorized | None = None, visit: Visit | None = None
    ) -> Response:
        """Answer one request, good or bad or `refused` already, and show it to the observers."""
        began = time.perf_counter()
        if visit is None:
            request_id = request_id_of(request)
        else:
            visit.is_shown, request_id = True, visit.request_id
        token = REQUEST_ID.set(request_id)
        try:
            found = refused or self.judge_head(request)
            response = await self._answer(request, found)
            response.request_id = request_id
            if self.cors is not None:
                self._add_cors(self.cors, request, response, is_visit=visit is not None)
            if self.observers:
                operation = found if isinstance(found, Operation) else self._operation_of(request)
                exchange = Exchange(request, response, operation, began, time.perf_counter() - began)
                if response.rest is None:
                    self.show(exchange)
                else:
                    response.rest = ShownAtEnd(self, exchange, response.rest)
            return response
        finally:
            REQUEST_ID.reset(token)

    def _add_cors(self, cors: CORS, request: Request, response: Response, is_visit: bool) -> None:
        """Put CORS into an answer, but not what goes into any answer of a visit, where a user may have put it."""
        fields = given = response.more_headers
        if not is_visit:
            fields = dict(cors.add_to(given.items(), request)) if given else cors.fields(request)
        if cors.is_preflight(request):
            fields = {**fields, **cors.leave(request, given.get("Allow"))}
        response.more_headers = fields

    def is_preflight(self, request: Request) -> bool:
        """Return whether a browser asks for leave to send a request, and gets it. The service then answers, in front of
        what a user has added, whatever the path: to the request itself a page may read also that there is no such path.
        """
        return self.cors is not None and self.cors.is_preflight(request)

    def show(self, exchange: Exchange) -> None:
        """Show an exchange to the observers."""
        for observe in self.observers:
            try:
                observe(exchange)
            except Exception:  # of whatever kind: an answer is not lost for it
                log.exception("observer_failed")

    async def _answer(self, request: Request, found: Operation | ServingError | str) -> Response:
        write = found.write_error if isinstance(found, Operation) else self._error_writer(request)
        try:
            if isinstance(found, Unauthorized):
                raise found
            if isinstance(found, Operation) and found.stream is not None and found.streams(request):
                found.check_media_type(request)
                return await self._stream(request, found.stream)
            takes_body = isinstance(found, Operation) and bool(found.media_types)
            await request.read_body(self.settings.limits.max_body_bytes, takes_body)
            if isinstance(request.body, ServingError):
                raise request.body
            if isinstance(found, ServingError):
                raise found
            if isinstance(found, str):
                return Response([b""], 204, {"Allow": found} if found else {}, media_type="")
            if takes_body:
                found.check_media_type(request)
                await self.inflate(request)
            return await found.endpoint(self, request)
        except ServingError as error:
            return write(error)
        except Exception:  # the outermost edge: whatever failed, the client learns no internals
            log.exception("request_failed", method=request.method, path=request.path)
            return write(InternalError("internal error; the log has it under this X-Request-ID"))

    async def _stream(self, request: Request, stream: Endpoint) -> Response:
        """Return an answer, with all its pieces if its length has to be known when it begins. It is bounded then.

        Raises `ContentTooLarge`.
        """
        response = await stream(self, request)
        if response.rest is None or request.may_stream:
            return response
        limit = WHOLE_ANSWER * self.settings.limits.max_body_bytes
        async with contextlib.aclosing(response.rest) as rest:
            async for piece in rest:
                response.pieces.append(piece)
                if response.length > limit:
                    raise ContentTooLarge("the answer is too long to be sent whole; send fewer lines, or use HTTP/1.1")
        response.rest = None
        return response

    async def inflate(self, request: Request) -> None:
        """Put what a compressed body has inside in its place. Raises `BadRequest`, `ContentTooLarge`."""
        field = request.header("content-encoding")
        if field is None or not request.body or (encoding := encoding_of(field)) == IDENTITY:
            return
        body = request.take_body()
        work = functools.partial(inflate, body, encoding, self.settings.limits.max_body_bytes)
        request.body = work() if len(body) <= SMALL_BODY_BYTES else await request.batcher.beside(work)

    def _error_writer(self, request: Request) -> Callable[[ServingError], Response]:
        """Return the `write_error` for a request without an operation: that of its path, or of its scope."""
        operations = self.routes.get(request.path) or {}
        scopes = [one for one in self.operations if one.scope and _is_below(request.path, one.scope)]
        return next((one.write_error for one in [*operations.values(), *scopes]), write_detail)

    def judge_head(self, request: Request) -> Operation | ServingError | str:
        """Return the operation that a request asks for, or why it gets none, before its body is read.

        To OPTIONS the answer is the methods that its path allows, or "" for a browser that asks about a path that is
        not the service's. It needs no key, for browsers send none with it.
        """
        try:
            if request.method == "OPTIONS":
                if request.path not in self.routes and self.is_preflight(request):
                    return ""
                return self._allowed(request.path)
            operation = self._find(request)
            if operation in self._secured:
                self._authorize(request)
        except ServingError as error:
            return error
        return operation

    def streams(self, request: Request) -> bool:
        """Return whether a body is JSON lines for an operation that takes them."""
        operation = self._operation_of(request)
        return operation is not None and operation.streams(request)

    def takes_body(self, request: Request) -> bool:
        """Return whether a request is for an operation that takes its body."""
        found = self.judge_head(request)
        return isinstance(found, Operation) and bool(found.media_types)

    def refusal(self, request: Request, may_be_ours: bool = False) -> Unauthorized | None:
        """Return why a request to what a user has added is refused: its path is not open, and it has no key.

        A path of the service's that `may_be_ours` is open if none of its operations needs a key.
        """
        ours = self.routes.get(request.path) if may_be_ours else None
        is_closed = self._is_closed(request.path) if ours is None else not self._secured.isdisjoint(ours.values())
        if not is_closed:
            return None
        try:
            self._authorize(request)
        except Unauthorized as error:
            return error
        return None

    def _is_closed(self, path: str) -> bool:
        """Return whether a path that a user has added needs a key."""
        if not self._keys or path in self._open_paths:
            return False
        return not path.startswith(self._open_folders) or ".." in path.split("/")

    def _find(self, request: Request) -> Operation:
        operation = self._operation_of(request)
        if operation is None:
            allowed = self._allowed(request.path)
            detail = f"{shorten(request.method)} is not allowed on {request.path}; use one of {allowed}"
            raise MethodNotAllowed(detail, {"Allow": allowed})
        return operation

    def _allowed(self, path: str) -> str:
        """Return the methods of a path, or those of all for `*` (RFC 9110, section 9.3.7). Raises `NotFound`."""
        methods = dict.fromkeys(one.method for one in self.operations if path in (one.path, "*"))
        if not methods:
            open_paths = [added for added in self.added_paths() if not self._is_closed(added)]
            raise NotFound(f"there is no {shorten(path)!r}; {nearest(path, self._beside(path, open_paths))}")
        return ", ".join([*methods, "OPTIONS"]).replace("GET", "GET, HEAD")

    def _beside(self, path: str, added: list[str]) -> list[str]:
        """Return the paths that a wrong one may have meant: those of its scope, or else scopes and what is in none."""
        scopes = [one.scope for one in self.operations if one.scope]
        described = dict.fromkeys(one.path for one in self.operations if one.is_described)
        own = next((scope for scope in scopes if _is_below(path, scope)), None)
        if own is not None:
            return [known for known in described if _is_below(known, own)]
        inner = {known for known in described for scope in scopes if _is_below(known, scope) and known != scope}
        return [*(known for known in described if known not in inner), *added]

    def _operation_of(self, request: Request) -> Operation | None:
        method = "GET" if request.method == "HEAD" else request.method
        return self.routes.get(request.path, {}).get(method) or self._aside_for(request, method)

    def _aside_for(self, request: Request, method: str) -> Operation | None:
        asides = [one for one in self._asides if (one.path, one.method) == (request.path, method)]
        return next((one for one in asides if one.only_for and one.only_for(request)), None)

    def _authorize(self, request: Request) -> None:
        """Compare what is offered in constant time with every key, so that the time taken tells nothing.

        A gateway may add a token of its own, beside which a key in the other field counts.
        """
        scheme, _, token = (request.header("authorization") or "").partition(" ")
        offered = [token.strip() if scheme.lower() == "bearer" else "", request.header("x-api-key") or ""]
        matches = [hmac.compare_digest(key.encode("latin-1"), known) for key in offered for known in self._keys]
        if not any(matches):
            detail = "no valid API key; send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            raise Unauthorized(detail, lingers=request.announces_body)

    def predict(self, request: Request, job: Job) -> Awaitable[Any]:
        """Return the result of a job. Raises `ServingError`, and what the estimator raises."""
        request.job = job
        request.rows = job.n_rows
        job.client_has_left = request.client_has_left
        return request.batcher.predict(job)
