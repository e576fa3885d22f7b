# The image installs what `make` installs: the same constraints, the same commands
# (tests/test_packaging.py compares them), without the development tools.

FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python -m venv /opt/imprint
ENV PATH=/opt/imprint/bin:$PATH
COPY constraints.txt ./
RUN python -m pip --disable-pip-version-check --no-cache-dir --quiet install --constraint constraints.txt hatchling editables
RUN python -m pip --disable-pip-version-check --no-cache-dir --quiet install --constraint constraints.txt --no-deps --retries 2 --extra-index-url ${TORCH_INDEX} torch
COPY pyproject.toml README.md LICENSE ./
COPY src/imprint/__init__.py src/imprint/py.typed src/imprint/
COPY models models
COPY adapters adapters
COPY server server
RUN python -m pip --disable-pip-version-check --no-cache-dir --quiet install --constraint constraints.txt --no-build-isolation '.[otel]'

FROM python:3.11-slim
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/imprint imprint
COPY --from=build /opt/imprint /opt/imprint
ENV PATH=/opt/imprint/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    IMPRINT_DATA_DIR=/var/lib/imprint
USER imprint
WORKDIR /var/lib/imprint
VOLUME /var/lib/imprint
EXPOSE 8765
ENTRYPOINT ["imprint"]
CMD ["serve", "--host", "0.0.0.0"]
