"""The routes: two ways to generate, the model, and how the service is doing."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.errors import NotReady, RequestError
from coordinator.api.answer import Job
from coordinator.api.chat import Chat
from coordinator.api.completions import Completions
from coordinator.api.errors import Endpoint, guarded, http_error
from coordinator.api.prompts import Asked, check_fit
from coordinator.api.reading import Reader, read_body
from coordinator.api.responding import Shape, respond
from coordinator.api.security import HostCheck, client_of, key_of
from coordinator.generation import GenerationRequest, Generator, ServedModel
from coordinator.text.histories import Histories


class Api(Shape, Protocol):
    """One of the two ways to ask for text."""

    path: str
    prompt_field: str
    id_prefix: str
    continues: bool

    def read(self, body: object, model: ServedModel, context_tokens: int, client: str) -> Asked:
        """Understand a client's body, or raise RequestError. Only its own bodies share what is remembered."""
        ...


def create_app(
    service: Generator,
    *,
    host: str = "127.0.0.1",
    allowed_hosts: Collection[str] = (),
    histories: Histories | None = None,
) -> Starlette:
    """The API over `service`. `host` is the address that the server will listen on: it decides which Host headers
    are believed; `allowed_hosts` are further names, such as a reverse proxy's."""
    reader = Reader()
    apis: tuple[Api, ...] = (Chat(histories or Histories()), Completions())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        reader.close()

    pages = _Pages(service)
    routes = [
        *(Route(api.path, guarded(_generation(service, reader, api)), methods=["POST"]) for api in apis),
        Route("/v1/models", guarded(pages.models), methods=["GET"]),
        Route("/v1/models/{name:path}", guarded(pages.model), methods=["GET"]),
        Route("/health", guarded(pages.health), methods=["GET"]),
        Route("/ready", guarded(pages.ready), methods=["GET"]),
        Route("/potluck/status", guarded(pages.status), methods=["GET"]),
    ]
    middleware = [Middleware(HostCheck, bound_host=host, allowed_hosts=allowed_hosts)]
    return Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: http_error}, lifespan=lifespan
    )


def _generation(service: Generator, reader: Reader, api: Api) -> Endpoint:
    """The endpoint that reads a body, generates and answers."""

    async def endpoint(request: Request) -> Response:
        body = await read_body(request)
        model = service.model()
        if model is None or model.context_tokens is None:
            raise NotReady((await service.ready()).reason or f"the coordinator is {service.phase()}")
        who = client_of(request), key_of(request)
        job = await reader.understand(body, partial(_job, api, model, model.context_tokens, who))
        return await respond(service, job, api, request.receive)

    return endpoint


def _job(api: Api, model: ServedModel, context_tokens: int, who: tuple[str, str], body: object) -> Job:
    """Everything about a request that can be known before it runs. Long ones are understood in a thread."""
    client, key = who
    asked = api.read(body, model, context_tokens, client)
    options, prompts = asked.options, asked.prompts
    check_fit(prompts, options, context_tokens, api.prompt_field)
    id = api.id_prefix + secrets.token_hex(12)
    request = GenerationRequest(
        id=id,
        prompts=prompts,
        sampling=options.sampling,
        n=options.n,
        max_tokens=options.max_tokens,
        min_tokens=options.min_tokens,
        ignore_eos=options.ignore_eos,
        eos_ids=model.text.eos_ids,
        client=client,
        salt=key,
        lane=options.lane,
        timeouts_s=options.timeouts_s,
    )
    return Job(id, int(time.time()), model, options, request, api.continues, asked.conversation)


class _Pages:
    """What can be read."""

    def __init__(self, service: Generator) -> None:
        self._service = service

    async def models(self, request: Request) -> Response:
        model = self._service.model()
        return _json({"object": "list", "data": [] if model is None else [_describe(model)]})

    async def model(self, request: Request) -> Response:
        model, name = self._service.model(), request.path_params["name"]
        if model is None:
            raise RequestError(f"the model {name!a} is not served here", field="model", code="model_not_found")
        model.check_name(name)
        return _json(_describe(model))

    async def health(self, request: Request) -> Response:
        """The process is alive, and what it does. Whether it can answer is /ready's to say."""
        return _json({"status": "ok", "phase": self._service.phase(), "reason": self._service.reason or None})

    async def ready(self, request: Request) -> Response:
        ready = await self._service.ready()
        return _json({"ready": ready.ok, "reason": ready.reason or None}, 200 if ready.ok else 503)

    async def status(self, request: Request) -> Response:
        return _json(self._service.status())


def _describe(model: ServedModel) -> Mapping[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "potluck",
        "max_model_len": model.context_tokens,
    }


def _json(value: Mapping[str, object], status: int = 200) -> Response:
    return Response(json.dumps(value).encode(), status, media_type="application/json")
