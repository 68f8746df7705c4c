"""What becomes of the service when more charges come than it can take."""

import statistics
import time
from typing import ClassVar, Self

import msgspec

from benchmarks.load import Figures
from benchmarks.open_loop import Report, drive
from benchmarks.parts import LAG, HttpPart

TIMES = (0.5, 1.0, 1.5, 4.0)  # the capacity
RAMP_S = 1.0  # connections come before the load, as the pools of running clients do


class Rate(msgspec.Struct, frozen=True):
    """One rate of one round, a row of the table. _cores: CPU seconds per second."""

    offered_per_s: float
    goodput_per_s: float  # answered 2xx while the load went on
    refused_per_s: float  # 503
    accepted_p50_ms: float
    accepted_p99_ms: float
    refused_p99_ms: float
    health_p99_ms: float
    other: int  # any other answer, none, or not even sent
    service_cores: float
    load_cores: float
    load_lag_p99_ms: float  # how late the load was sent: its own fault, not the service's

    @classmethod
    def of(cls, report: Report, service_cpu_s: float) -> Self:
        answered_well = report.answered_2xx + report.codes.get("too_busy", 0)
        return cls(
            offered_per_s=report.rate,
            goodput_per_s=report.goodput_per_s,
            refused_per_s=report.refused.count / report.seconds,
            accepted_p50_ms=report.accepted.p50_ms,
            accepted_p99_ms=report.accepted.p99_ms,
            refused_p99_ms=report.refused.p99_ms,
            health_p99_ms=report.probes["/health"].latency.p99_ms,
            other=report.offered - answered_well,
            service_cores=service_cpu_s / report.took_s,
            load_cores=report.cpu_s / report.took_s,
            load_lag_p99_ms=report.lag_p99_ms,
        )


class Overload(HttpPart):
    """POST /v1/charge in an open loop at multiples of its capacity; the part's own figures are the
    goodput and the accepted charges' latencies at the last of them.

    The capacity is measured first, in every round, as the closed loop of `charge`: with clients
    that cost next to nothing. That is the strict choice where load and service share a machine,
    since an open loop of 4 times the rate takes a good part of a core away from the service.
    """

    name: ClassVar[str] = "overload"

    def __enter__(self) -> Self:
        super().__enter__()
        self._capacities: list[float] = []
        self._rates: dict[float, list[Rate]] = {times: [] for times in TIMES}
        self._accepted = 0
        self._refusal_us: list[float] = []
        return self

    def run(self, seconds: float) -> Figures:
        cpu_s = self._server.cpu_s()
        closed = super().run(seconds)
        charge_cpu_s = (self._server.cpu_s() - cpu_s) / closed.answers
        reports = []
        for times in TIMES:
            self._wait_until_level()
            cpu_s = self._server.cpu_s()
            report = drive(self._server.port, times * closed.per_s, seconds, ramp_s=RAMP_S)
            cpu_s = self._server.cpu_s() - cpu_s
            self._accepted += report.answered_2xx
            reports.append((times, report, cpu_s))
        self._wait_until_level()
        if seconds > 1:  # not the warm-up
            self._capacities.append(closed.per_s)
            for times, report, cpu_s in reports:
                self._rates[times].append(Rate.of(report, cpu_s))
            if refused := report.statuses.get("503"):
                cpu_s -= report.answered_2xx * charge_cpu_s
                self._refusal_us.append(cpu_s / refused * 1e6)
        accepted = report.accepted
        return Figures(
            report.goodput_per_s,
            accepted.p50_ms,
            accepted.p99_ms,
            accepted.count,
            report.refused.count,
        )

    def _wait_until_level(self) -> None:
        until = time.monotonic() + 60
        while self.count(LAG):
            assert time.monotonic() < until, "the projector does not catch up"
            time.sleep(0.05)

    def rows(self) -> dict[str, dict[str, float]]:
        return {
            f"{times:g} x": {
                field: round(statistics.median(getattr(rate, field) for rate in rates), 2)
                for field in Rate.__struct_fields__
            }
            for times, rates in self._rates.items()
        }

    def remarks(self) -> list[str]:
        stored = self.count("SELECT count(*) FROM payment_events WHERE topic = 'PaymentCharged'")
        assert self.answered + self._accepted <= stored, "an answered charge is not stored"
        capacity = statistics.median(self._capacities)
        goodputs = {
            times: statistics.median(rate.goodput_per_s for rate in rates)
            for times, rates in self._rates.items()
        }
        peak = max(capacity, *goodputs.values())
        remarks = [
            *super().remarks(),
            f"capacity in a closed loop: {capacity:,.0f}/s; goodput at {TIMES[-1]:g} x is "
            f"{goodputs[TIMES[-1]] / peak:.0%} of the peak",
        ]
        if self._refusal_us:
            cost_us = statistics.median(self._refusal_us)
            remarks.append(
                f"a refusal costs about {cost_us:.0f} us of the service's CPU (what is left at "
                f"{TIMES[-1]:g} x when accepted charges cost what they do in the closed loop)"
            )
        return remarks
