"""The `payments` command. Data goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 could not (one line says why), 2 wrong arguments, or what it prints cannot be
written. `audit verify`, `doctor`, `rebuild --dry-run`, `import-legacy` and `reconcile orders`: 0
nothing was found, 1 something was, 2 anything else. `callbacks test`: 0 taken, 1 refused, 2
anything else. `psql`: its own.

processes.py    serve and work                   greeting.py     what ./run prints
schema.py       migrate                          settings.py     settings
doctor.py       doctor, which looks at what checks.py, work_checks.py and orders_check.py say
audit.py        audit verify and audit head      rebuild.py      rebuild
replay.py       replay                           explain.py      explain
export.py       export                           moments.py      a time or a position as argument
callbacks.py    callbacks                        unfulfilled.py  callbacks list --unfulfilled
reconcile.py    reconcile orders                 giving_back.py  giving-back
parked.py       parked                           log.py          log accept-loss
backup.py       dump and restore                 psql.py         psql
programs.py     the Postgres programs of those   keys.py         keys
import_legacy.py  import-legacy                  start.py        what most commands begin with
exits.py        how commands end                 output.py       tables and JSON
progress.py     how far a long command is
"""

import click

from payments.cli.exits import Commands

# Name: where it is, and its first sentence. A command is imported when it is called, since most of
# the time of a short one would go into importing all the others.
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
