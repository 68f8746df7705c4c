"""`python -m payments.probe [VARIABLE [PATH]]`: exit code 0 if the local service responds with 200.

For the health checks of containers, every few seconds: it imports only the standard library, and
uses no proxy. VARIABLE names the variable with the port, by default PORT; PATH is /health by
default.
"""

import http.client
import os
import sys
from collections.abc import Mapping, Sequence

TIMEOUT_S = 3.0
DEFAULTS = {"PORT": "4004"}
EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - compared with


def address(environ: Mapping[str, str], variable: str = "PORT") -> tuple[str, int]:
    """Host and port of a service with these settings."""
    host = environ.get("HOST", "")
    port = environ.get(variable) or DEFAULTS[variable]
    return "127.0.0.1" if host in EVERYWHERE else host, int(port)


def main(arguments: Sequence[str]) -> int:
    variable, path = [*arguments, *("PORT", "/health")[len(arguments) :]]
    try:
        connection = http.client.HTTPConnection(*address(os.environ, variable), timeout=TIMEOUT_S)
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return _told(error)
    return 0 if status == 200 else _told(f"responded with status {status}")


def _told(reason: object) -> int:
    sys.stderr.write(f"{reason}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
