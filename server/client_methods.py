"""The methods that both clients have alike: each sends one call of `client_routes.py`, or all calls
that a list takes. Said once, for both; how a call is sent is for the clients to say.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from inspect import Parameter, signature
from types import MethodType
from typing import Any, Generic, ParamSpec, TypeVar, overload

from imprint.server import client_routes as routes
from imprint.server.client_calls import Call
from imprint.server.client_types import Adaptation, Document, Page

P = ParamSpec("P")
Item = TypeVar("Item")
Given = TypeVar("Given")
Awaited = TypeVar("Awaited")
Json = dict[str, Any]


class Method(Generic[P, Given, Awaited]):
    """What a client gives for a call: `Given` at once, or, for asyncio, `Awaited`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __set_name__(self, owner: type, name: str) -> None:
        self._function.__name__, self._function.__qualname__ = name, f"{owner.__name__}.{name}"

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, client: BlockingMethods, owner: type) -> Callable[P, Given]: ...
    @overload
    def __get__(self, client: AsyncMethods, owner: type) -> Callable[P, Awaited]: ...
    def __get__(self, client: object, owner: type) -> Any:
        return self._function if client is None else MethodType(self._function, client)


def _sent(make: Callable[P, Call[Item]]) -> Method[P, Item, Coroutine[Any, Any, Item]]:
    """Gives what the reply to the call becomes."""
    return Method(_function(make, "_do"))


def _streamed(make: Callable[P, Call[bytes]]) -> Method[P, Iterator[Json], AsyncIterator[Json]]:
    """Gives the objects of the reply as they come."""
    return Method(_function(make, "_records"))


def _walked(
    page: Callable[..., Call[Page[Item]]], about: str
) -> Method[[], Iterator[Item], AsyncIterator[Item]]:
    """Gives what all pages hold."""

    def walk(self: Any) -> Any:
        return self._walk(page)

    walk.__doc__ = about
    return Method(walk)


def _function(make: Callable[P, object], send: str) -> Callable[..., Any]:
    @wraps(make)
    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return getattr(self, send)(make(*args, **kwargs))

    known = signature(make)
    itself = Parameter("self", Parameter.POSITIONAL_ONLY)
    # `help` leaves out the first one of a method's
    method.__signature__ = known.replace(  # type: ignore[attr-defined]
        parameters=[itself, *known.parameters.values()]
    )
    return method


class _Methods:
    health = _sent(routes.health)
    version = _sent(routes.version)
    metrics = _sent(routes.metrics)

    create_document = _sent(routes.create_document)
    upload_document = _sent(routes.upload_document)
    append_document = _sent(routes.append_document)
    document = _sent(routes.document)
    document_text = _sent(routes.document_text)
    documents_page = _sent(routes.documents_page)
    documents: Method[[], Iterator[Document], AsyncIterator[Document]] = _walked(
        routes.documents_page, "All documents, newest first, page by page."
    )
    delete_document = _sent(routes.delete_document)

    adapt = _sent(routes.adapt)
    adaptation = _sent(routes.adaptation)
    adaptations_page = _sent(routes.adaptations_page)
    adaptations: Method[[], Iterator[Adaptation], AsyncIterator[Adaptation]] = _walked(
        routes.adaptations_page, "All jobs, newest first, page by page."
    )
    cancel = _sent(routes.cancel)
    delete = _sent(routes.delete)
    events_page = _sent(routes.events_page)
    study = _sent(routes.study)
    study_profile = _sent(routes.study_profile)
    study_tokens = _sent(routes.study_tokens)
    import_adapter = _sent(routes.import_adapter)

    answer = _sent(routes.answer)
    stream_answer = _streamed(routes.stream_answer)
    complete = _sent(routes.complete)
    stream_complete = _streamed(routes.stream_complete)
    chat = _sent(routes.chat)
    stream_chat = _streamed(routes.stream_chat)
    tokenize = _sent(routes.tokenize)
    detokenize = _sent(routes.detokenize)
    models_page = _sent(routes.models_page)
    models: Method[[], Iterator[Json], AsyncIterator[Json]] = _walked(
        routes.models_page, "The base model, then all adapted ones, newest first, page by page."
    )
    model = _sent(routes.model)


class BlockingMethods(_Methods):
    """The methods of `ImprintClient`, which has `_do`, `_records` and `_walk`."""


class AsyncMethods(_Methods):
    """The methods of `AsyncImprintClient`, which has the same three."""
