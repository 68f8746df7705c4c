"""`payments keys`: API keys for PAYMENTS_API_KEYS."""

import hashlib
import secrets

import click

from payments.clients import check_client_name

KEY_BYTES = 32  # random, so it cannot be guessed, and a plain SHA-256 of it is enough


@click.group()
def keys() -> None:
    """API keys of the service's clients."""


@keys.command()
@click.argument("name")
def new(name: str) -> None:
    """Print a new key for the client NAME and, below it, the entry for PAYMENTS_API_KEYS.

    The entry contains the key's SHA-256; the key itself is stored nowhere. A client may have
    several keys: to replace one, add the new entry and restart, switch the client to the new key,
    and remove the old entry. The client named staff reads and refunds the payments of all clients.
    """
    try:
        check_client_name(name)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="NAME") from None
    key = secrets.token_urlsafe(KEY_BYTES)
    click.echo(f"For {name}, as the header Authorization: Bearer …; shown only now:", err=True)
    click.echo(key)
    click.echo("For PAYMENTS_API_KEYS; separate entries by commas:", err=True)
    click.echo(f"{name}:{hashlib.sha256(key.encode()).hexdigest()}")
