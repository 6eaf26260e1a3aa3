"""The small routes: what is served, how it is, and text to tokens and back."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gemel.server.errors import ApiError
from gemel.server.protocol import DetokenizeBody, TokenizeBody
from gemel.server.service import Service, service_of


def _card(service: Service) -> dict[str, object]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "gemel",
        "max_model_len": service.llm.engine.max_context,
    }


async def models(request: Request) -> Response:
    """GET /v1/models."""
    return JSONResponse({"object": "list", "data": [_card(service_of(request))]})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}; ids may hold slashes."""
    service = service_of(request)
    service.check_model(request.path_params["model_id"])
    return JSONResponse(_card(service))


async def health(request: Request) -> Response:
    """GET /health: 200 while requests are taken and the engine's thread lives, else 503. Needs no key and tells nothing else."""
    llm = service_of(request).llm
    status = "draining" if llm.draining else "ok" if llm.healthy else "unhealthy"
    return JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics, for Prometheus."""
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def stats(request: Request) -> Response:
    """GET /stats: the live panel's numbers."""
    service = service_of(request)
    return JSONResponse({"model": service.model_name, "max_context": service.llm.engine.max_context, **service.metrics.panel()})


async def tokenize(request: Request) -> Response:
    """POST /tokenize."""
    service = service_of(request)
    body = await service.read(request, TokenizeBody)
    if body.messages is not None:
        ids = await service.render(body.messages, body.tools, body.add_generation_prompt, body.continue_final_message)
    else:
        assert body.prompt is not None
        ids = await asyncio.to_thread(service.llm.tokenizer.encode, body.prompt)
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.llm.engine.max_context})


async def detokenize(request: Request) -> Response:
    """POST /detokenize."""
    service = service_of(request)
    body = await service.read(request, DetokenizeBody)
    vocab_size = service.llm.engine.vocab_size
    wrong = next((token for token in body.tokens if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ApiError(400, f"{str(wrong)[:40]} is not a token: ids go from 0 to {vocab_size - 1}.", param="tokens", code="invalid_value")
    return JSONResponse({"text": await asyncio.to_thread(service.llm.tokenizer.decode, body.tokens)})
