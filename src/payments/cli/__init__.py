"""The `payments` command. Data goes to stdout, everything else to stderr.

Exit codes: 0 success, 1 failure (with the reason in one line), 2 wrong arguments, or the output
cannot be written. `audit verify`, `doctor`, `rebuild --dry-run`, `import-legacy` and `reconcile
orders`: 0 no findings, 1 findings, 2 any other failure. `callbacks test`: 0 accepted, 1 rejected, 2
any other failure. `psql`: its own.

processes.py    serve and work                   greeting.py     what ./run prints
schema.py       migrate                          settings.py     settings
doctor.py       doctor, with the checks of checks.py, work_checks.py, orders_check.py and
                provider_checks.py
audit.py        audit verify and audit head      rebuild.py      rebuild
replay.py       replay                           explain.py      explain
export.py       export                           moments.py      times and positions as arguments
callbacks.py    callbacks                        unfulfilled.py  callbacks list --unfulfilled
reconcile.py    reconcile orders                 giving_back.py  giving-back
parked.py       parked                           log.py          log accept-loss
backup.py       dump and restore                 psql.py         psql
programs.py     runs the Postgres programs       keys.py         keys
import_legacy.py  import-legacy                  start.py        settings, logs, connection
exits.py        errors and exit codes            output.py       tables, JSON and CSV
progress.py     progress of long commands
"""

import click

from payments.cli.exits import Commands

# Name: module and attribute, and the first sentence of its help. A command is imported when it is
# called: importing all of them would take most of the time of a short one.
COMMANDS = {
    "serve": ("processes:serve", "Start the service and run until SIGTERM."),
    "work": (
        "processes:work",
        "Follow the log, settle payments and send callbacks until SIGTERM, without the API.",
    ),
    "migrate": ("schema:migrate", "Migrate the database's schema to this version and exit."),
    "settings": (
        "settings:settings",
        "Print every setting with its value, default and meaning; secrets are hidden.",
    ),
    "keys": ("keys:keys", "API keys of the service's clients."),
    "doctor": (
        "doctor:doctor",
        "Check settings, database, followers, unsettled payments, callbacks and providers.",
    ),
    "replay": (
        "replay:replay_log",
        "Print the log, oldest first: all of it, or the events that the options select.",
    ),
    "explain": (
        "explain:explain_payment",
        "Print the history of a payment, oldest first; PAYMENT is its id.",
    ),
    "export": (
        "export:export_money",
        "Print a period's captures and refunds as CSV, one row for each.",
    ),
    "audit": (
        "audit:audit",
        "Check the log against its seals, and the read model against the log.",
    ),
    "rebuild": (
        "rebuild:rebuild_read_model",
        "Compare a read model with the log, and replace the rows that differ.",
    ),
    "parked": (
        "parked:parked",
        "Payments that a read model skips, since one of their events could not be applied.",
    ),
    "import-legacy": (
        "import_legacy:import_legacy",
        "Import the payments of the Node service, which used this database before, into the log.",
    ),
    "callbacks": (
        "callbacks:callbacks",
        "List, show, redrive and test callbacks to Order Service.",
    ),
    "reconcile": (
        "reconcile:reconcile",
        "Compare captured payments with Order Service's records.",
    ),
    "giving-back": (
        "giving_back:giving_back",
        "Resume automatic refunds after their limit was reached.",
    ),
    "dump": (
        "backup:dump",
        "Write the whole database to a new FILE, for `payments restore`.",
    ),
    "restore": (
        "backup:restore",
        "Load FILE, made by `payments dump`, into an empty database.",
    ),
    "psql": (
        "psql:open_psql",
        'Open psql on the service\'s database; ARGS are passed to psql, such as -c "SELECT 1".',
    ),
    "log": ("log:log_group", "Accept that the log lost events."),
}


@click.group(
    cls=Commands, commands_at=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="payment-service")
def main() -> None:
    """The Payment Service. Settings are environment variables: `payments settings` lists them."""
