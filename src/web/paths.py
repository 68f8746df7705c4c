"""The paths of the API, each in one spelling, and which of them need an API key.

The framework also accepts `//metrics`, `/metrics/` and `/%6detrics` as `/metrics`, while a proxy
with a rule for `/metrics` sees three other paths. Here these are not found.
"""

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

import httptools
from litestar import Litestar
from litestar.routes import HTTPRoute

from payments.errors import Unauthorized

# The value of a parameter: no slash, also no encoded one, and neither `.` nor `..`.
_PARAMETER = r"(?!\.\.?(?:/|\Z))(?:[^/%]|%(?!2[fF]))+"


WEBHOOK = "/v1/providers/{name}/webhook"


class Path(NamedTuple):
    template: str
    needs_key: bool


class Paths:
    """The paths of an application, including those registered so far.

    `values`, by template: the only values of its one parameter; with another there is no such path.
    """

    def __init__(
        self, app: Litestar, values: Mapping[str, Collection[str]] = MappingProxyType({})
    ) -> None:
        self.all = [_path(route) for route in app.routes if isinstance(route, HTTPRoute)]
        self.fixed = {path.template.encode(): path for path in self.all if "{" not in path.template}
        self._with_parameters = []
        for path in self.all:
            if path.template in values:
                for value in values[path.template]:
                    self.fixed[re.sub(r"\{\w+\}", value, path.template).encode()] = path
            elif "{" in path.template:
                self._with_parameters.append((_pattern(path.template), path))

    def find(self, target: bytes) -> Path | None:
        """The path of a request target, None if there is none; ValueError for an invalid target."""
        path = target.partition(b"?")[0] if target.startswith(b"/") else _path_of_url(target)
        found = self.fixed.get(path)
        if found is None:
            for pattern, one in self._with_parameters:
                if pattern.fullmatch(path):
                    return one
        return found


def _path(route: HTTPRoute) -> Path:
    operations = [handler.opt.get("operation") for handler in route.route_handlers]
    needs_key = any(each is not None and Unauthorized in each.problems for each in operations)
    return Path(route.path_format, needs_key)


def _pattern(template: str) -> re.Pattern[bytes]:
    parts = re.split(r"\{\w+\}", template)
    return re.compile(_PARAMETER.join(re.escape(part) for part in parts).encode())


def _path_of_url(target: bytes) -> bytes:
    """The absolute form, which is meant for proxies, is accepted too (RFC 9112 section 3.2.2)."""
    try:
        path: bytes | None = httptools.parse_url(target).path
    except httptools.HttpParserInvalidURLError as error:
        raise ValueError(target) from error
    if path is None:
        raise ValueError(target)
    return path
