"""The `payments` command. Data goes to stdout, everything else to stderr.

Exit codes: 0 success, 1 failure (with the reason in one line), 2 wrong arguments, or the output
cannot be written. `audit verify`, `doctor`, `rebuild --dry-run`, `import-legacy` and `reconcile
orders`: 0 no findings, 1 findings, 2 any other failure. `callbacks test`: 0 accepted, 1 rejected, 2
any other failure. `psql`: its own.

processes.py    serve and work                   greeting.py     what ./run prints
schema.py       migrate                          settings.py     settings
doctor.py       doctor, with the checks of checks.py, work_checks.py and orders_check.py
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
        "Follow the log, settle open payments and call back until SIGTERM, without the API.",
    ),
    "migrate": ("schema:migrate", "Bring the database's schema up to date and exit."),
    "settings": (
        "settings:settings",
        "Print every setting with its value, default and meaning; secrets are hidden.",
    ),
    "keys": ("keys:keys", "API keys of the service's clients."),
    "doctor": (
        "doctor:doctor",
        "Check settings, database, followers, seals, open payments and callbacks; one line each.",
    ),
    "replay": (
        "replay:replay_log",
        "Print the log, oldest first: all of it, or what the options name.",
    ),
    "explain": (
        "explain:explain_payment",
        "Print what happened to a payment, oldest first; PAYMENT is its id.",
    ),
    "export": (
        "export:export_money",
        "Print what money moved in a time, as CSV for spreadsheets: a row for each movement.",
    ),
    "audit": (
        "audit:audit",
        "Whether the log is what was sealed, and the read model what the log says.",
    ),
    "rebuild": (
        "rebuild:rebuild_read_model",
        "Compare a read model with the log, and write the rows that differ.",
    ),
    "parked": (
        "parked:parked",
        "Streams that a read model goes on without, since an event of theirs could not be applied.",
    ),
    "import-legacy": (
        "import_legacy:import_legacy",
        "Bring the payments of the Node service, whose database this was, into the log.",
    ),
    "callbacks": ("callbacks:callbacks", "What Order Service is owed and was told."),
    "reconcile": ("reconcile:reconcile", "Compare what was captured with what others know of it."),
    "giving-back": (
        "giving_back:giving_back",
        "Payments that the service gives back by itself, since their orders failed.",
    ),
    "dump": (
        "backup:dump",
        "Write the whole database to FILE, which must not exist yet, for `payments restore`.",
    ),
    "restore": (
        "backup:restore",
        "Write what `payments dump` wrote to FILE into an empty database.",
    ),
    "psql": (
        "psql:open_psql",
        "Open psql on the service's database; ARGS are psql's own, such as -c \"SELECT 1\".",
    ),
    "log": ("log:log_group", "What a person decides about the log."),
}


@click.group(
    cls=Commands, commands_at=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="payment-service")
def main() -> None:
    """The Payment Service. Settings are environment variables: `payments settings` lists them."""
