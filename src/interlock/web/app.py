"""The ASGI application of a front: which path is answered by what."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from interlock.core.errors import InterlockError
from interlock.core.limits import RETRY_AFTER_SECONDS
from interlock.core.targets import State
from interlock.web.admin import QUESTIONS, VERBS, AdminEndpoint
from interlock.web.answers import encoder
from interlock.web.endpoints import chat_endpoint, check_use, completions_endpoint
from interlock.web.errors import ApiError
from interlock.web.front import Front
from interlock.web.taking_up import TakeUpEndpoint

METRICS_SECONDS_MAX = 2.0
"""What a scrape waits for the coordinator: Prometheus gives up after ten seconds."""
PAUSED_TARGETS = (State.PAUSED, State.SUSPENDED)


def make_app(front: Front) -> Starlette:
    """Of a front that is started."""
    pages = Pages(front)
    routes = [
        Route("/v1/completions", completions_endpoint(front), methods=["POST"]),
        Route("/v1/chat/completions", chat_endpoint(front), methods=["POST"]),
        Route("/v1/models", pages.models, methods=["GET"]),
        Route("/v1/models/{model:path}", pages.model, methods=["GET"]),
        Route("/health", pages.health, methods=["GET"]),
        Route("/metrics", pages.metrics, methods=["GET"]),
        Route("/interlock/streams/{id}", TakeUpEndpoint(front), methods=["GET"]),
        *(Route(f"/interlock/{word}", AdminEndpoint(front, word), methods=["GET"]) for word in QUESTIONS),
        *(Route(f"/interlock/{verb}", AdminEndpoint(front, verb), methods=["POST"]) for verb in VERBS),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: unrouted, ApiError: told})


async def told(_: Request, error: Exception) -> Response:
    """An `ApiError` as its client sees it."""
    assert isinstance(error, ApiError)
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(error.body, error.status, headers, media_type="application/json")


async def unrouted(request: Request, error: Exception) -> Response:
    """No such path, or no such method there, in OpenAI's shape as everything else."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path[:256], request.method
    if error.status_code == 404:
        return await told(request, ApiError(404, f"There is nothing at {path}.", code="not_found"))
    if error.status_code == 405:
        said = ApiError(405, f"{path} does not answer {method}.", code="method_not_allowed")
        response = await told(request, said)
        response.headers.update(error.headers or {})
        return response
    return await told(request, ApiError(error.status_code, str(error.detail)))


class Pages:
    """Everything that is answered at once."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def models(self, request: Request) -> Response:
        """The model that is served; 503 with a sentence where nobody serves it: a fleet that is STOPPED, or has not begun.

        Load balancers and clients take a 200 here for *ask me*: a vLLM server answers it exactly while it serves, also while it
        sleeps. So a fleet that is paused or suspended says 200, too.
        """
        check_use(self._front, request.scope)
        return as_json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        check_use(self._front, request.scope)
        self._front.check_model(request.path_params["model"])
        return as_json(self._model())

    def _model(self) -> dict[str, Any]:
        front = self._front
        return {
            "id": front.served_model_name,
            "object": "model",
            "created": front.created_s,
            "owned_by": "interlock",
            "max_model_len": front.max_model_tokens(),
        }

    async def health(self, _: Request) -> Response:
        """200 where a request that comes now is served, or waits because somebody paused the fleet on purpose."""
        front = self._front
        view = front.fleet.membership
        states: dict[str, int] = {}
        for member in view.members if view is not None else []:
            states[member.state] = states.get(member.state, 0) + 1
        if front.leaving:
            status = "leaving"
        elif front.fleet.ready:
            status = "running"
        elif view is not None and view.target in PAUSED_TARGETS and states:
            status = "paused"
        else:
            status = "no_engine"
        body = {
            "status": status,
            "target": view.target if view is not None else None,
            "members": states,
            "coordinator": "connected" if front.fleet.coordinator_connected else "away",
        }
        if status in ("running", "paused"):
            return as_json(body)
        return as_json(body, 503, {"retry-after": str(RETRY_AFTER_SECONDS)})

    async def metrics(self, request: Request) -> Response:
        """This front's own, and after them the coordinator's, which has no port."""
        front = self._front
        check_use(front, request.scope)
        try:
            coordinator = (await front.coordinator.metrics(METRICS_SECONDS_MAX)).encode()
        except (InterlockError, OSError, TimeoutError) as error:
            words = " ".join(str(error).split())
            coordinator = f"# the coordinator cannot be asked: {words}\n".encode()
        return Response(
            front.metrics.render() + coordinator, media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def as_json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A whole answer."""
    return Response(encoder.encode(content), status, headers, media_type="application/json")
