"""What a process finds in its environment and does not follow.

A variable counts if this service documents it. Libraries read many more, some of them when they are
imported, and other software on the machine sets them for itself: with PGHOSTADDR in the environment
payments would be stored in another server than the settings name. So this comes before any other
import, and imports only the standard library.
"""

import os
from collections.abc import MutableMapping
from fnmatch import fnmatchcase

# TLS and who may answer: what libpq, which has no other place for it, is told about one's own
# Postgres. The embedded one has a socket.
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
    "LITESTAR_*",  # Litestar: a debugger instead of the answer 500
    "LOGURU_*",  # Loguru: levels, filters and formats
    "PROMETHEUS_MULTIPROC_DIR",  # prometheus_client: metrics in files, shared with other programs
    "prometheus_multiproc_dir",
    "*_NO_EXTENSIONS",  # aiohttp and the packages below it: parsers that are not tested here
    "SSLKEYLOGFILE",  # ssl: the keys of every connection, to the provider as well, in a file
)


def prepare() -> None:
    """To be called once, before anything of this service or a library is imported."""
    occupy_descriptors()
    forget(os.environ)


def forget(environ: MutableMapping[str, str]) -> None:
    """Removes what is IGNORED, but for LIBPQ if the database is one's own."""
    kept = LIBPQ if environ.get("DATABASE_HOST") else frozenset()
    for name in list(environ):
        if name not in kept and any(fnmatchcase(name, pattern) for pattern in IGNORED):
            del environ[name]


def occupy_descriptors() -> None:
    """If stdin, stdout or stderr is closed, the next file or connection would get its descriptor,
    and what is meant for a person. What is written to such a stdout fails, and the command says so;
    that nobody can be told is no error."""
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, flags)  # the lowest that is free
            os.set_inheritable(opened, True)  # psql has the same need of it
