"""A database's payments belong to one ledger of the simulated provider."""

import asyncio
import uuid
from pathlib import Path
from typing import Any

import psycopg
import pytest

from payments.database import Database, DatabaseAddress
from payments.errors import StartError
from payments.gateways.ledger_identity import FORGET, check_ledger
from payments.service import Service
from payments.settings import Settings
from tests.process import ServiceProcess, at, run
from tests.support import ScriptedGateway  # noqa

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]
