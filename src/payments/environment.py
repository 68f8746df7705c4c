"""Removes environment variables that must not affect the service.

Only documented variables count. Libraries read many more, some when they are imported, and other
software on the machine sets them for itself: with PGHOSTADDR in the environment payments would be
stored in another server than the settings name. So this runs before any other import, and imports
only the standard library.
"""

import os
from collections.abc import MutableMapping
from fnmatch import fnmatchcase

# TLS and server authentication of an external Postgres, which only libpq's variables can set. The
# embedded one uses a socket.
LIBPQ = frozenset(
    {
        *("PGSSLMODE", "PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY", "PGSSLCRL", "PGSSLCRLDIR"),
        *("PGSSLNEGOTIATION", "PGSSLSNI", "PGSSLCERTMODE"),
        *("PGSSLMINPROTOCOLVERSION", "PGSSLMAXPROTOCOLVERSION"),
        *("PGCHANNELBINDING", "PGREQUIREAUTH"),
    }
)

IGNORED = (
    "PG[!_]*",  # libpq: another server, another user, settings of the session
    "PSYCOPG_*",  # psycopg: another implementation
    "TZINFO_TOPIC",  # eventsourcing: the time zone of events
    "LITESTAR_*",  # Litestar: a debugger instead of the response 500
    "LOGURU_*",  # Loguru: levels, filters and formats
    "PROMETHEUS_MULTIPROC_DIR",  # prometheus_client: metrics in files, shared with other programs
    "prometheus_multiproc_dir",
    "*_NO_EXTENSIONS",  # aiohttp and its dependencies: parsers that are not tested here
    "SSLKEYLOGFILE",  # ssl: writes the keys of every connection to a file, even of the provider's
)


def prepare() -> None:
    """Must be called once, before any module of this service or of a library is imported."""
    occupy_descriptors()
    forget(os.environ)


def forget(environ: MutableMapping[str, str]) -> None:
    """Removes the IGNORED variables, except LIBPQ with an external database."""
    kept = LIBPQ if environ.get("DATABASE_HOST") else frozenset()
    for name in list(environ):
        if name not in kept and any(fnmatchcase(name, pattern) for pattern in IGNORED):
            del environ[name]


def occupy_descriptors() -> None:
    """Opens /dev/null for closed standard streams: else the next file or connection would get the
    descriptor, and the output meant for people. Writing to such a stdout fails, which the command
    reports; such a stderr discards messages."""
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, flags)  # gets the lowest free descriptor
            os.set_inheritable(opened, True)  # psql needs it too
