"""What `./run` prints once the service listens: its address, its data and sample requests."""

from payments.database.connections import DatabaseAddress
from payments.opening import data_dir
from payments.settings import Settings

EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared with

GREETING = """
Payment Service on {url}  (Ctrl-C stops it)
Data: {data}

  curl -X POST {url}/v1/charge -H "Content-Type: application/json" \\
    -H "Idempotency-Key: abc123" \\
    -d '{{"merchant_order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9", "amount_cents": 1500, \
"currency": "INR"}}'
  curl {url}/v1/payments/058c9593-e150-402f-ab5b-37dd4c9816f0
  curl {url}/health
"""


def greeting(settings: Settings, address: DatabaseAddress) -> str:
    if settings.database_host is None:
        data = f"{data_dir(settings) / 'postgres'} (embedded Postgres)"
    else:
        data = f"Postgres, {address!r}"
    return GREETING.format(url=url_of(settings.host, settings.port), data=data)


def url_of(host: str, port: int) -> str:
    """The address to open on this machine."""
    if host in EVERYWHERE:
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
