"""The connections of an endpoint: kept, used again, never too many, and none left behind."""

import asyncio
import random
from contextlib import suppress

import pytest

from payments.order_service import endpoint as endpoints
from payments.order_service.endpoint import Exchange
from tests.callbacks.raw_server import (
    OK,
    Server,
    anyio_backend,  # noqa: F401 - a fixture
    endpoint_of,
    many,
    post,
    serving,
    then_close,
)
from tests.machine import within
from tests.support import until

pytestmark = pytest.mark.anyio

TIMEOUT_S = 0.3
HEAD = b"HTTP/1.1 200 OK\r\n"


class TestConnections:
    async def test_one_is_kept_and_used_again(self) -> None:
        async with serving(OK) as server, endpoint_of(server.url) as endpoint:
            for _ in range(5):
                assert (await post(endpoint)).status == 200
        assert (server.connections, len(server.requests)) == (1, 5)

    async def test_one_that_was_idle_too_long_is_not_used_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(endpoints, "KEEPALIVE_EXPIRY_S", 0.02)
        async with serving(OK) as server, endpoint_of(server.url) as endpoint:
            assert (await post(endpoint)).status == 200
            with within(1):
                await until(lambda: not server.open)
            assert (await post(endpoint)).status == 200
        assert server.connections == 2

    async def test_no_more_than_allowed(self) -> None:
        now, most = 0, 0

        async def count(server: Server, writer: asyncio.StreamWriter) -> None:
            nonlocal now, most
            now += 1
            most = max(now, most)
            await asyncio.sleep(0.002)
            now -= 1
            await server.write(writer, OK)

        async with (
            serving(count) as server,
            endpoint_of(server.url, connections_max=4) as endpoint,
        ):
            exchanges = await many(endpoint, 40)
        assert {done.status for done in exchanges} == {200}
        assert (most, server.connections) == (4, 4)

    async def test_one_that_the_server_has_closed_is_not_used_again(self) -> None:
        async with serving(then_close(OK)) as server, endpoint_of(server.url) as endpoint:
            for number in range(3):
                assert (await post(endpoint)).status == 200
                await until(lambda number=number: server.connections - server.open > number)
                await asyncio.sleep(0.01)

    async def test_a_request_is_never_sent_twice(self) -> None:
        """A kept connection that ends as it is used again: Order Service may be at work. The next
        attempt comes soon enough, but not at the same moment."""

        async def close_at_the_second(server: Server, writer: asyncio.StreamWriter) -> None:
            if len(server.requests) == 2:
                writer.close()
            else:
                await server.write(writer, OK)

        async with serving(close_at_the_second) as server, endpoint_of(server.url) as endpoint:
            assert (await post(endpoint)).status == 200
            assert (await post(endpoint))[:2] == (None, "unreachable")
            assert len(server.requests) == 2
            assert (await post(endpoint)).status == 200

    @pytest.mark.parametrize("later", [False, True])
    async def test_an_answer_too_many_is_not_taken_for_the_next(self, later: bool) -> None:
        async def answer(server: Server, writer: asyncio.StreamWriter) -> None:
            stray = OK.replace(b"200", b"500")
            if later:
                await server.write(writer, OK)
                await asyncio.sleep(0.01)
                await server.write(writer, stray)
            else:
                await server.write(writer, OK + stray)

        async with serving(answer) as server, endpoint_of(server.url) as endpoint:
            for _ in range(3):
                assert (await post(endpoint)).status == 200
                await until(lambda: not server.open)  # what came behind the answer ended it
        assert server.connections == 3

    async def test_close_ends_what_is_under_way(self) -> None:
        async with serving(None) as server, endpoint_of(server.url) as endpoint:
            running = asyncio.create_task(post(endpoint))
            await until(lambda: server.requests)
            await endpoint.close()
            with within(1):
                assert (await running)[:2] == (None, "unreachable")
            await until(lambda: not server.open)

    @pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 25])
    async def test_a_cancellation_at_any_step_leaves_nothing_behind(self, steps: int) -> None:
        tasks = len(asyncio.all_tasks())
        async with serving(OK) as server:
            async with endpoint_of(server.url, connections_max=1) as endpoint:
                running = asyncio.create_task(post(endpoint))
                for _ in range(steps):
                    await asyncio.sleep(0)
                running.cancel()
                with suppress(asyncio.CancelledError):
                    await running
                assert (await post(endpoint)).status == 200
            await until(lambda: not server.open)
        await until(lambda: len(asyncio.all_tasks()) == tasks)

    async def test_a_cancellation_is_passed_on(self) -> None:
        async with serving(None) as server, endpoint_of(server.url) as endpoint:
            running = asyncio.create_task(post(endpoint))
            await until(lambda: server.requests)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await until(lambda: not server.open)

    async def test_a_storm_of_failures_and_cancellations_uses_no_connection_up(self) -> None:
        dice = random.Random(1)

        async def anything(server: Server, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(dice.random() / 50)
            if dice.random() < 0.3:
                writer.transport.abort()
            else:
                await server.write(writer, OK)

        async with (
            serving(anything) as server,
            endpoint_of(server.url, timeout_s=TIMEOUT_S, connections_max=4) as endpoint,
        ):
            running = [asyncio.create_task(post(endpoint)) for _ in range(300)]
            for number, each in enumerate(running):
                await asyncio.sleep(0)
                if number % 20 == 0:
                    each.cancel()  # before anything can happen
                elif dice.random() < 0.3:
                    asyncio.get_running_loop().call_later(dice.random() / 10, each.cancel)
            results = await asyncio.gather(*running, return_exceptions=True)
            errors = [each.error for each in results if isinstance(each, Exchange)]
            assert set(errors) <= {None, "unreachable", "timeout"}
            assert "timeout" in errors
            assert any(isinstance(each, asyncio.CancelledError) for each in results)
            server.answer = OK
            assert {done.status for done in await many(endpoint, 8)} == {200}
            await until(lambda: server.open <= 4)
