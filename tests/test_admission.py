"""Who is taken on: the bounds of one process, with the time handed in."""

import pytest

from payments.admission import (
    ANONYMOUS_TIMES,
    CALM_S,
    CLIENT_TIMES,
    MEMORY_MIN,
    MEMORY_OF_A_RUN,
    Admission,
    Bound,
    Client,
)
from payments.errors import TooBusy


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def enter(client: Client, requests: int = 10_000) -> int:
    """As many as are let in, of so many; the number."""
    for number in range(requests):
        if not client.admit():
            return number
        client.enter()
    return requests


class TestOneClient:
    @pytest.fixture
    def admission(self, clock: Clock) -> Admission:
        return Admission(requests_max=40, provider_calls_max=3, clock=clock)

    @pytest.fixture
    def client(self, admission: Admission) -> Client:
        return admission.client("default")

    def test_a_burst_may_take_all(self, client: Client) -> None:
        assert enter(client) == 40

    def test_after_a_refusal_there_are_fewer_until_nobody_was_refused_for_a_while(
        self, client: Client, clock: Clock
    ) -> None:
        enter(client)
        client.leave(31)
        for _ in range(5):  # each refusal counts from anew
            clock.now += CALM_S * 0.9
            assert enter(client) == 1
            client.leave()
        clock.now += CALM_S
        assert enter(client) == 31

    def test_who_waits_for_somebody_else_does_not_count(self, client: Client) -> None:
        assert enter(client) == 40
        client.leave(40)
        assert enter(client, 10) == 10
        client.leave(10)
        client.enter()  # whoever comes back is not asked
        assert client.requests.held == 1

    @pytest.mark.parametrize("requests_max", [1, 2, 3])
    @pytest.mark.parametrize("clients", [1, 2])
    def test_one_is_always_let_in(self, requests_max: int, clients: int, clock: Clock) -> None:
        client = Admission(requests_max, 1, clients, clock).client("a")
        assert enter(client) == requests_max
        client.leave(requests_max)
        assert enter(client) == 1

    def test_provider_calls(self, client: Client) -> None:
        for _ in range(3):
            client.take_provider_call()
        with pytest.raises(TooBusy):
            client.take_provider_call()
        client.release_provider_call()
        client.take_provider_call()

    def test_memory_is_there_for_as_many_as_may_be_under_way(self) -> None:
        assert Admission(512, 1000).memory.total == MEMORY_MIN
        assert Admission(512, 100_000).memory.total == 100_512 * MEMORY_OF_A_RUN


class TestSeveralClients:
    @pytest.fixture
    def admission(self, clock: Clock) -> Admission:
        return Admission(requests_max=512, provider_calls_max=1000, clients=3, clock=clock)

    def test_a_burst_leaves_some_to_the_others(self, admission: Admission) -> None:
        assert enter(admission.client("greedy")) == 448
        assert enter(admission.client("other"), 50) == 50

    def test_while_it_is_crowded_each_has_an_equal_share(
        self, admission: Admission, clock: Clock
    ) -> None:
        greedy, other = admission.client("greedy"), admission.client("other")
        enter(greedy)
        while greedy.requests.held:  # all along while the burst is worked off
            assert enter(other, 50) == 50
            other.leave(50)
            greedy.leave(min(30, greedy.requests.held))
            clock.now += 0.01
        assert enter(greedy) == 128
        assert enter(other) == 64
        greedy.leave(100)
        assert enter(greedy) == 64 - 28
        other.leave(64)  # whoever holds nothing counts for nothing
        assert enter(greedy) == 128 - 64

    def test_however_many_are_greedy_one_that_asks_for_little_gets_it(
        self, admission: Admission, clock: Clock
    ) -> None:
        greedy, other = [admission.client(name) for name in "abcdefgh"], admission.client("other")
        for turn in range(200):
            for client in greedy:
                enter(client)
                client.leave(client.requests.held // 4)
            clock.now += 0.01
            if turn > 10:  # what they took at first is worked off
                assert enter(other, 5) == 5
                other.leave(5)

    def test_a_client_that_is_alone_has_everything_if_there_is_no_other(self, clock: Clock) -> None:
        assert enter(Admission(512, 1000, 1, clock).client("only")) == 512

    def test_neither_provider_calls_nor_runs_nor_memory_can_all_be_taken(
        self, admission: Admission
    ) -> None:
        for kind in ("provider_calls", "runs", "memory"):
            greedy = getattr(admission.client("greedy"), kind)
            unit = greedy.bound.total // 1000
            while greedy.take(unit):
                pass
            assert greedy.held >= greedy.bound.total * (CLIENT_TIMES / (CLIENT_TIMES + 1) - 0.01)
            other = getattr(admission.client("other"), kind)
            assert other.take(unit), kind
            other.add(-unit)
            assert not greedy.take(unit)


class TestBound:
    def test_what_does_not_fit_takes_nothing(self) -> None:
        share = Bound(10).share()
        assert share.take(10)
        assert not share.take()
        share.add(-4)
        assert not share.take(5)
        assert (share.held, share.bound.taken) == (6, 6)

    def test_the_fuller_it_is_the_less_each_may_have(self) -> None:
        """Many that hold as much as they may do not keep one out that wants little."""
        bound = Bound(8_000_000, ANONYMOUS_TIMES)
        for _ in range(60):
            share = bound.share()
            while share.take(1000):
                pass
            assert share.held < 500_000
        assert bound.share().take(2_000)
