# Arguments choose the torch build: TORCH_CONSTRAINTS is a constraints file, PIP_ARGS extra pip arguments.
FROM python:3.12-slim
ARG TORCH_CONSTRAINTS=constraints.txt
ARG PIP_ARGS=""
WORKDIR /app
COPY . .
RUN pip install --no-cache-dir -c "${TORCH_CONSTRAINTS}" ${PIP_ARGS} . \
    && useradd --create-home bitplan \
    && install -d -o bitplan /data
USER bitplan
ENV BITPLAN_DATA_DIR=/data
CMD ["bitplan", "serve"]
