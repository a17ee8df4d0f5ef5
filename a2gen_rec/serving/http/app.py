"""HTTP application: the routes of the service and the files of the page."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from types import SimpleNamespace
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, FastAPI, Path, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from pydantic_core import from_json, to_json
from starlette.types import Receive, Scope, Send

from a2gen_rec import __version__
from a2gen_rec.data.schema import Feature
from a2gen_rec.serving.engine.service import RankingService
from a2gen_rec.serving.http import schema
from a2gen_rec.serving.http.errors import (
    ERRORS,
    ApiError,
    add_error_handlers,
    queue_full,
    service_unavailable,
    to_api_error,
    worker_died,
)
from a2gen_rec.serving.http.guard import ClientDisconnected, RequestGuard
from a2gen_rec.serving.http.serialization import rank_response

WEB = files("a2gen_rec.serving").joinpath("web")
"""Directory of the package that is served next to the routes; its ``index.html`` is the page."""
SAMPLE_USERS, SAMPLE_ITEMS = 8, 40
MAX_USERS = 100
RANK = ("POST", "/v1/rank")

ResponseT = TypeVar("ResponseT")


def create_app(service: RankingService, keys: Sequence[str] = ()) -> RequestGuard:
    """Return the service as an ASGI application, which closes the service at shutdown.

    Args:
        service: The service.
        keys: Accepted API keys; none are required if empty. Changes of the list take effect immediately.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    config = service.config
    app = FastAPI(
        title="a2gen",
        version=__version__,
        summary="Ranks short videos for a user and records impressions.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
        servers=[{"url": config.root_path}] if config.root_path else None,
        responses=_errors(400, 403, 408, 413, 415, 421, 422, 500, 503),
    )
    schemes = [Security(HTTPBearer(auto_error=False)), Security(APIKeyHeader(name="X-Api-Key", auto_error=False))]
    app.include_router(_routes(service), dependencies=schemes if keys else [], responses=_errors(401) if keys else {})
    app.include_router(_probes(service))
    if WEB.joinpath("index.html").is_file():
        # Not a mount, which would match the paths of all routes with other methods: 404 instead of 405.
        app.router.default = StaticFiles(directory=str(WEB), html=True)
    add_error_handlers(app, service.metrics)

    def check_admission(method: str, path: str) -> ApiError | None:
        if (method, path) != RANK:
            return None
        if not service.is_ready:
            return worker_died()
        return queue_full() if service.batcher.is_full else None

    return RequestGuard(
        _RankFastPath(app, service),
        keys=keys,
        max_body=1024 * config.max_body_kb,
        read_timeout_s=config.read_timeout_s,
        max_requests=config.max_concurrent_requests,
        root_path=config.root_path,
        metrics=service.metrics,
        admission_check=check_admission,
    )


def _routes(service: RankingService) -> APIRouter:
    routes = APIRouter(prefix="/v1", route_class=_JsonRoute)

    @routes.post("/rank", response_model=schema.RankResponse, responses=_errors(504))
    async def rank(body: schema.RankRequest, request: Request) -> Response:
        """Rank candidates for a user, with the recorded history or the one in the request."""
        return await _rank(service, body, request.receive)

    @routes.post("/events", response_model=schema.EventsResponse, responses=_errors(507))
    async def events(body: schema.EventsRequest) -> Response:
        """Record impressions of a user. Once acknowledged, they survive a crash and count in the next ranking."""
        await service.record_impressions(body.user, [impression.to_impression() for impression in body.impressions])
        return _json({"recorded": len(body.impressions)})

    @routes.get("/users/{user:path}/history", response_model=schema.HistoryResponse)
    async def history(
        user: Annotated[str, Path(min_length=1, max_length=schema.MAX_ID_LENGTH)],
        last: Annotated[int, Query(ge=1, le=schema.MAX_IMPRESSIONS)] = 50,
    ) -> Response:
        """Return the most recent recorded impressions of a user, oldest first."""
        impressions = await service.get_history(user, last)
        durations = {impression.item: service.ranker.duration_s(impression.item) for impression in impressions}
        return _json(
            {
                "user": user,
                "impressions": [schema.ImpressionSchema.from_impression(impression) for impression in impressions],
                "durations_s": {item: duration for item, duration in durations.items() if duration is not None},
            }
        )

    @routes.delete("/users/{user:path}/history", response_model=schema.DeleteHistoryResponse, responses=_errors(507))
    async def delete_history(
        user: Annotated[str, Path(min_length=1, max_length=schema.MAX_ID_LENGTH)],
    ) -> Response:
        """Delete all impressions of a user. Once acknowledged, the deletion is durable; no ranking uses them."""
        num_deleted, is_overwritten = await service.delete_history(user)
        return _json({"num_deleted": num_deleted, "overwritten": is_overwritten})

    @routes.get("/users", response_model=schema.UsersResponse)
    async def users(count: Annotated[int, Query(ge=1, le=MAX_USERS)] = SAMPLE_USERS) -> Response:
        """Return some users with recorded impressions."""
        return _json({"users": await service.sample_users(count)})

    @routes.get("/model", response_model=schema.ModelResponse)
    async def model() -> Response:
        """Return the inputs and outputs of the model in service, and the limits of requests."""
        return _json(_model_info(service))

    @routes.post("/model/reload", response_model=schema.ReloadResponse, responses=_errors(409))
    async def reload() -> Response:
        """Reload the model; a new version replaces the current one between two batches."""
        version, previous = await service.reload()
        return _json({"version": version, "previous_version": previous, "swapped": version != previous})

    return routes


def _probes(service: RankingService) -> APIRouter:
    probes = APIRouter()

    @probes.get("/healthz", response_model=schema.HealthResponse)
    async def healthz() -> Response:
        """Liveness: whether the process responds."""
        return _json({"status": "ok"})

    @probes.get("/readyz", response_model=schema.HealthResponse)
    async def readyz() -> Response:
        """Readiness: whether the service accepts requests."""
        if service.draining:
            raise service_unavailable("draining", "the service is shutting down")
        if not service.is_ready:
            raise worker_died()
        await asyncio.to_thread(service.store.check)
        return _json({"status": "ready"})

    @probes.get("/metrics", response_class=PlainTextResponse, responses=_errors(401))
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return probes


class _RankFastPath:
    """Fast path for rankings around FastAPI's layers, with the same result. FastAPI only documents the route: most
    requests are rankings, and its layers take more time of the event loop than parsing and response."""

    def __init__(self, app: FastAPI, service: RankingService) -> None:
        self.app, self.service = app, service
        self.route = SimpleNamespace(path=RANK[1])  # route name in metrics and log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) != RANK:
            await self.app(scope, receive, send)
            return
        scope["route"] = self.route
        message = await receive()  # the complete body, read by the guard
        try:
            response = await _rank(self.service, _parse_rank_request(message["body"]), receive)
        except ERRORS as error:
            raise to_api_error(error) from error
        await response(scope, receive, send)


def _parse_rank_request(body: bytes) -> schema.RankRequest:
    """Parse and validate a body like FastAPI."""
    if not body:
        raise RequestValidationError([{"loc": ("body",), "msg": "Field required"}])
    try:
        return schema.RankRequest.model_validate(_parse_json(body), from_attributes=True)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**details, "loc": ("body", *details["loc"])} for details in errors]) from error


async def _rank(service: RankingService, body: schema.RankRequest, receive: Receive) -> Response:
    timeout_s = (body.timeout_ms or service.config.default_timeout_ms) / 1000
    ranking = service.rank(body.to_query(), body.history is None, timeout_s)
    result = await _cancel_on_disconnect(receive, ranking)
    return _json(rank_response(result.ranked, result.fallbacks))


class _JsonRequest(Request):
    async def json(self) -> Any:
        return _parse_json(await self.body())


def _parse_json(body: bytes) -> Any:
    """Parse a body with bounded nesting; rejects NaN, lone surrogates and encodings other than UTF-8."""
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, "not_json", f"invalid JSON: {error}") from error


class _JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


async def _cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, ResponseT]) -> ResponseT:
    """Return the result of ``work``, which is cancelled if the client disconnects.

    Raises:
        ClientDisconnected: The client has disconnected.
    """
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(receive())  # the only message after the body
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        task.cancel()
        disconnect.cancel()


def _model_info(service: RankingService) -> dict[str, Any]:
    card, config, ranker = service.ranker.card, service.config, service.ranker
    raw = [feature for feature in card.inputs if feature.level in ("user", "item", "context")]
    from_time = card.time_features
    return {
        "version": ranker.version,
        "dataset": card.name,
        "actions": card.actions,
        "timed_actions": card.timed_actions,
        "labels": card.labels,
        "objectives": card.objectives,
        "negative_actions": card.negative_actions,
        "features": [
            {
                "name": feature.name,
                "level": feature.level,
                "kind": feature.kind,
                "multi_valued": isinstance(feature, Feature) and feature.multi_valued,
            }
            for feature in raw
            if feature.name not in from_time
        ],
        "sort_keys": ranker.sort_keys,
        "session_gap_s": card.session_gap_s,
        "max_history": card.max_history,
        "limits": {
            "candidates": schema.MAX_CANDIDATES,
            "impressions": schema.MAX_IMPRESSIONS,
            "identifier_characters": schema.MAX_ID_LENGTH,
            "body_bytes": 1024 * config.max_body_kb,
            "timeout_ms": config.default_timeout_ms,
        },
        "sample_users": ranker.sample_users(SAMPLE_USERS),
        "sample_items": ranker.sample_items(SAMPLE_ITEMS),
    }


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schema.ErrorResponse} for status in statuses}


def _json(content: dict[str, Any]) -> Response:
    return Response(to_json(content, inf_nan_mode="null"), media_type="application/json")
