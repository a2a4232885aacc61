"""Query strings in a schema's bounds, as bodies are."""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import parse_qsl

import msgspec
from starlette.types import Scope

from interlock.web.errors import invalid
from interlock.web.schema import explain_validation

T = TypeVar("T", bound=msgspec.Struct)
FIELDS_MAX = 32


def read_query(scope: Scope, kind: type[T]) -> T:
    """Raises `ApiError` 400 naming the parameter."""
    try:
        pairs = parse_qsl(
            scope["query_string"].decode("ascii"),
            keep_blank_values=True,
            max_num_fields=FIELDS_MAX,
            errors="strict",
        )
    except ValueError as error:
        raise invalid(f"The query string cannot be read: {error}.") from error
    given = dict(pairs)
    if len(given) < len(pairs):
        raise invalid("The query string names a parameter twice.")
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise explain_validation(str(error)) from error
