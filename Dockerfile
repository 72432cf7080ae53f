# API, runner and Ray node in one image. `docker build .` has the CPU build of torch; arguments choose another:
#
#   TORCH_BACKEND      cpu, cu130, ... or auto: the build of torch that uv takes
#   TORCH_CONSTRAINTS  a constraints file that pins torch
#   EXTRAS             extras of Bitplan, separated by spaces
#   INSTALL_ARGS       more arguments for `uv pip install`, e.g. an index of your own

FROM python:3.12-slim-trixie AS build
ARG TORCH_BACKEND=cpu
ARG TORCH_CONSTRAINTS=constraints.txt
ARG EXTRAS="diffusion ray"
ARG INSTALL_ARGS=""
ENV UV_LINK_MODE=copy \
    UV_COMPILE_BYTECODE=1 \
    UV_NO_CACHE=1 \
    VIRTUAL_ENV=/opt/bitplan
RUN python -m pip install --no-cache-dir "uv==0.13.9" && uv venv "${VIRTUAL_ENV}"
WORKDIR /src

# What is installed changes seldom: a change of our code does not repeat this layer.
COPY pyproject.toml constraints*.txt ./
RUN for extra in ${EXTRAS}; do set -- "$@" --extra "${extra}"; done \
    && for argument in ${INSTALL_ARGS}; do set -- "$@" "${argument}"; done \
    && uv pip install --torch-backend "${TORCH_BACKEND}" -c "${TORCH_CONSTRAINTS}" -r pyproject.toml "$@"

COPY README.md LICENSE ./
COPY quant quant
COPY sensitivity sensitivity
COPY search search
COPY service service
COPY migrations migrations
RUN uv pip install --no-deps .


FROM python:3.12-slim-trixie
# pg_dump and pg_restore of the server's major version, for `bitplan backup`; security updates come with the base image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends postgresql-client-17 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 bitplan \
    && useradd --uid 10001 --gid 10001 --no-log-init --create-home bitplan \
    && install -d -o 10001 -g 10001 -m 0750 /data /cache
COPY --from=build /opt/bitplan /opt/bitplan
COPY --chmod=755 docker/on-ray-node /usr/local/bin/on-ray-node
ENV PATH=/opt/bitplan/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    BITPLAN_DATA_DIR=/data \
    BITPLAN_RAY_CACHE=/cache
USER 10001:10001
VOLUME ["/data"]
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=8)"]
CMD ["bitplan", "serve", "--host", "0.0.0.0"]
