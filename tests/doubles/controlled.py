"""A double in a process of its own, which its test tells what to do: a JSON line in, one out.

It prints its port as its first line, and ends when its stdin is closed: its parent is gone.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

ROOT = Path(__file__).parent.parent.parent

Answer = TypeVar("Answer")


class ControlledProcess:
    """`python -m MODULE --port PORT ARGUMENTS…`. The port stays the same over restarts."""

    def __init__(self, module: str, arguments: Sequence[str], port: int) -> None:
        self.port = port
        self._command = [sys.executable, "-m", module, *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._asking = threading.Lock()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        self._process = subprocess.Popen(
            [*self._command, "--port", str(self.port)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.port = int(self._line())
        return self

    def stop(self) -> int | None:
        """SIGTERM; the exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9. What it keeps in files is still there."""
        self._end(signal.SIGKILL)

    def restart(self) -> Self:
        self.kill()
        return self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _ask(self, answer: type[Answer], **command: Any) -> Answer:
        assert self._process is not None
        assert self._process.stdin is not None
        with self._asking:
            self._process.stdin.write(msgspec.json.encode(command) + b"\n")
            self._process.stdin.flush()
            line = self._line()
        return msgspec.json.decode(line, type=answer)

    def _line(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"{self._command[2]} ended with {self._process.wait(timeout=10)}"
        return line

    def _end(self, how: signal.Signals) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        process.send_signal(how)
        try:
            return process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(timeout=5)
        finally:
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
