"""Moments as command line arguments: a time, or a position of the log."""

import re
from contextlib import suppress
from datetime import datetime

import click

from payments.times import read_time

POSITION_MAX = 2**63 - 1


class _Time(click.ParamType[datetime | int]):
    """A time in RFC 3339, or copied from our tables or psql; converted to UTC."""

    name = "time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime | int:
        if isinstance(value, datetime):
            return value
        with suppress(ValueError):
            return read_time(_as_rfc_3339(str(value)))
        raise click.BadParameter(f"{value!r} is not a time like 2026-01-31T18:30:00Z", ctx, param)


def _as_rfc_3339(copied: str) -> str:
    """Replaces the space before the time by T, and adds the offset's minutes, which psql omits."""
    return re.sub(r"([+-]\d\d)\Z", r"\1:00", re.sub(r"\A(\S{10}) ", r"\1T", copied))


class _Moment(_Time):
    """A time as above, or a position: a whole number from 1."""

    name = "position|time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime | int:
        if isinstance(value, int):
            return value
        if isinstance(value, str) and re.fullmatch("[+-]?[0-9]+", value):
            if not (value.isdigit() and 1 <= int(value[:20]) <= POSITION_MAX):
                text = f"{value} is not a position: must be a whole number from 1"
                raise click.BadParameter(text, ctx, param)
            return int(value)
        return super().convert(value, param, ctx)


TIME = _Time()
MOMENT = _Moment()
