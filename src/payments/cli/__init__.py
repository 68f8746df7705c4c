"""The `payments` command. Data goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 could not (one line says why), 2 wrong arguments.
"""

import sys

import click
import psycopg

from payments.cli.audit import audit
from payments.cli.callbacks import callbacks
from payments.cli.doctor import doctor
from payments.cli.explain import explain_payment
from payments.cli.keys import keys
from payments.cli.output import one_line
from payments.cli.parked import parked
from payments.cli.processes import migrate, serve, settings, work
from payments.cli.rebuild import rebuild_read_model
from payments.cli.replay import replay_log
from payments.database import reason_of
from payments.errors import PaymentsError, StartError


class _Group(click.Group):
    """Turns the errors that are meant for people into one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (StartError, PaymentsError) as error:
            reason = str(error)
        except psycopg.OperationalError as error:  # a lock that is held, a server that is gone
            reason = f"the database: {reason_of(error)}: try again later"
        except psycopg.errors.InsufficientPrivilege as error:
            reason = f"the database: {reason_of(error)}"
        click.echo(f"payments: {one_line(reason)}", err=True)
        sys.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="payment-service")
def main() -> None:
    """The Payment Service. Settings are environment variables: `payments settings` lists them."""


for command in (
    *(serve, work, migrate, settings, keys, doctor),
    *(replay_log, explain_payment, audit, rebuild_read_model),
    *(parked, callbacks),
):
    main.add_command(command)
