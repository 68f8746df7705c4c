"""`python -m payments` is the `payments` command."""

from payments.cli import main

main()
