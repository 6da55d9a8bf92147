# The image: slim, a numeric user, a root that may be read-only. It holds the three rooms and what
# they need. Not built where it was written, for lack of an engine; tests/test_docs.py reads it.
FROM python:3.12-slim AS build
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY gateway gateway
COPY registry registry
COPY monitors monitors
# --build-arg EXTRAS='[http2,postgres]' adds what pyproject.toml lists as optional.
ARG EXTRAS=
RUN python -m venv /opt/driftgate \
    && /opt/driftgate/bin/python -m pip install --no-cache-dir --constraint constraints.txt ".$EXTRAS"

FROM python:3.12-slim
COPY --from=build /opt/driftgate /opt/driftgate
# A number, so that Kubernetes can see that it is not root.
RUN mkdir /models /state && chown 10001:10001 /state
ENV PATH=/opt/driftgate/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    DRIFTGATE_REGISTRY=/models \
    DRIFTGATE_STATE_DIR=/state
USER 10001:10001
VOLUME /state
EXPOSE 8000
# By Python, since the image has no curl; not by urllib, which would ask a proxy of the environment.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('DRIFTGATE_PORT', '8000')), timeout=2); c.request('GET', '/v2/health/ready'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["driftgate"]
CMD ["serve"]
