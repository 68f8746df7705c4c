"""Loads that run in processes of their own."""

import json
import subprocess
import sys
from typing import Any, Self

from tests.process import ROOT


class Load:
    """A process of benchmarks.flood_load, for the time of a block."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "benchmarks.flood_load", *map(str, arguments)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def goes_on(self) -> bool:
        return self._process.poll() is None

    def result(self) -> Any:
        printed, _ = self._process.communicate(timeout=60)
        assert self._process.returncode == 0
        return json.loads(printed)
