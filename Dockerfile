# The Payment Service: `payments serve` on port 4004. docs/container.md says how to run it.

FROM python:3.11-slim-bookworm AS build
WORKDIR /build
# What builds stays here; what runs goes into /opt/payments, which has no pip.
# otel: with OpenTelemetry (docs/tracing.md).
ARG REQUIREMENTS=runtime
COPY requirements requirements
RUN python -m venv /opt/build \
    && python -m venv --without-pip /opt/payments \
    && /opt/build/bin/pip install --no-cache-dir --require-hashes -r requirements/build.txt \
    && /opt/build/bin/pip --python /opt/payments/bin/python install --no-cache-dir \
        --require-hashes -r requirements/${REQUIREMENTS}.txt
COPY pyproject.toml README.md ./
COPY src src
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir wheels . \
    && /opt/build/bin/pip --python /opt/payments/bin/python install --no-cache-dir --no-deps \
        --no-index wheels/*.whl

FROM python:3.11-slim-bookworm
# The embedded Postgres refuses to run as root, and needs a user with a name. OpenShift runs an image
# as some other user, to whom it gives a name, of the group 0: so that group may do the same.
RUN groupadd --gid 10001 payments \
    && useradd --uid 10001 --gid payments --home-dir /var/lib/payments --create-home payments \
    && chown 10001:0 /var/lib/payments \
    && chmod 770 /var/lib/payments
COPY --from=build /opt/payments /opt/payments
ENV PATH=/opt/payments/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOST=0.0.0.0 \
    PORT=4004 \
    PAYMENTS_DATA_DIR=/var/lib/payments
USER 10001:10001
# The embedded database, unless DATABASE_HOST is set, and the simulated provider's ledger.
VOLUME /var/lib/payments
EXPOSE 4004
HEALTHCHECK --interval=10s --timeout=4s --start-period=60s \
    CMD ["python", "-m", "payments.probe"]
ENTRYPOINT ["payments"]
CMD ["serve"]
