# One image for every part of ours: the service, Ray nodes, MLflow and the initialisers differ by
# their command. `--build-arg EXTRAS=deploy,fast` installs more.
FROM python:3.11.13-slim-bookworm

# pg_dump of `maskray backup` must be no older than the server: Debian 12 has 15, compose 17.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev postgresql-common \
    && /usr/share/postgresql-common/pgdg/apt.postgresql.org.sh -y \
    && apt-get install --yes --no-install-recommends postgresql-client-17 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 maskray \
    && mkdir -p /data /app

WORKDIR /app
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY contract contract
COPY model model
COPY pipelines pipelines
COPY workers workers
COPY orchestrator orchestrator
ARG EXTRAS=deploy
RUN pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

COPY studies studies
COPY deploy deploy
USER maskray
ENV PYTHONUNBUFFERED=1
CMD ["maskray", "--help"]
