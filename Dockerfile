# m3 serve over the folder that is mounted at /bank, which has an m3.yaml. For a CPU; --build-arg TORCH= takes the CUDA build,
# and EXTRAS=lance,valkey adds extras.
FROM python:3.11-slim AS build
ARG TORCH=https://download.pytorch.org/whl/cpu
ARG EXTRAS=
WORKDIR /source
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY m3runtime m3runtime
COPY backends backends
COPY model model
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir ${TORCH:+--index-url "$TORCH"} torch \
    && /venv/bin/pip install --no-cache-dir ".[fast,train,transformers,sentence-transformers,documents,serve${EXTRAS:+,$EXTRAS}]"

FROM python:3.11-slim
RUN useradd --create-home --uid 1000 m3 && install -d -o m3 -g m3 /bank
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH
USER 1000
WORKDIR /bank
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/ready')"]
# Without M3_KEYS or serve.keys_file it refuses to listen on all addresses.
CMD ["m3", "serve", "--address", "0.0.0.0", "--port", "8000"]
