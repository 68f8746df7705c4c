"""`payments explain`: the history of one payment."""

from uuid import UUID

import click

from payments.cli.output import one_line, print_json
from payments.cli.start import begin, with_database
from payments.opening import open_database
from payments.queries.explain import explain, fulfilment_text, time_text


@click.command("explain")
@click.argument("payment", type=click.UUID)
@click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True
)
def explain_payment(payment: UUID, form: str) -> None:
    """Print the history of a payment, oldest first; PAYMENT is its id.

    Its requests with clients and keys, all events, each response of the provider, each callback
    attempt, the later settling, and why its order may not have been fulfilled. Only reads stored
    data.
    """
    with open_database(begin(), to="read") as address:
        story = with_database(address, lambda database: explain(database, payment))
    if form == "json":
        print_json(story)
        return
    click.echo(one_line(f"payment {story.payment_id}: {story.state}"))
    for entry in story.entries:
        line = f"{time_text(entry.at)}  {entry.kind:<19}  {entry.by or '-':<10}  {entry.text}"
        if entry.request_id is not None:
            line += f" (request {entry.request_id})"
        click.echo(one_line(line))
    if story.fulfilment is not None:
        click.echo(one_line(fulfilment_text(story.fulfilment)))
