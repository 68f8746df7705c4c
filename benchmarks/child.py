"""Programs that a part runs to their end. What one says on stderr is in the error if it fails."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


class ChildError(Exception):
    """What failed, and what it said."""

    def __init__(self, what: str, said: str | bytes | None = None) -> None:
        text = said.decode(errors="replace") if isinstance(said, bytes) else said or ""
        super().__init__(f"{what}; on stderr: {text.strip() or 'nothing'}")


def output_of(command: Sequence[str], *, timeout_s: float, stdin: str = "") -> str:
    """Runs a command in the project's directory and returns its stdout; ChildError."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        what = f"{' '.join(command)} took more than {timeout_s:g} s"
        raise ChildError(what, expired.stderr) from None
    if done.returncode:
        raise ChildError(f"{' '.join(command)} ended with {done.returncode}", done.stderr)
    return done.stdout
