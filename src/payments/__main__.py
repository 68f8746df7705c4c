"""The `payments` command, also as `python -m payments`."""

from payments.environment import prepare


def main() -> None:
    prepare()
    from payments.cli import main as command

    command()


if __name__ == "__main__":
    main()
