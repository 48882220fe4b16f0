# One image for every part: the service, Ray nodes and MLflow differ by their command.
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends curl gcc git libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 maskray \
    && mkdir -p /storage /data /app \
    && chown maskray:maskray /storage /data /app

WORKDIR /app
COPY --chown=maskray:maskray pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY --chown=maskray:maskray contract contract
COPY --chown=maskray:maskray model model
COPY --chown=maskray:maskray pipelines pipelines
COPY --chown=maskray:maskray workers workers
COPY --chown=maskray:maskray orchestrator orchestrator
RUN pip install --no-cache-dir --constraint constraints.txt '.[postgres]'

COPY --chown=maskray:maskray studies studies
USER maskray
VOLUME /storage
ENV PYTHONUNBUFFERED=1
CMD ["maskray", "--help"]
