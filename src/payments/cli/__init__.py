"""The `payments` command. Data goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 could not (one line says why), 2 wrong arguments. `audit verify` and
`rebuild --dry-run`: 0 nothing was found, 1 something was, 2 anything else.
"""

import click

from payments.cli.audit import audit
from payments.cli.callbacks import callbacks
from payments.cli.doctor import doctor
from payments.cli.exits import Commands
from payments.cli.explain import explain_payment
from payments.cli.keys import keys
from payments.cli.log import log_group
from payments.cli.parked import parked
from payments.cli.processes import migrate, serve, settings, work
from payments.cli.rebuild import rebuild_read_model
from payments.cli.replay import replay_log


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="payment-service")
def main() -> None:
    """The Payment Service. Settings are environment variables: `payments settings` lists them."""


for command in (
    *(serve, work, migrate, settings, keys, doctor),
    *(replay_log, explain_payment, audit, rebuild_read_model),
    *(parked, callbacks, log_group),
):
    main.add_command(command)
