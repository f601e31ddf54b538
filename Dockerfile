# Two images: `compile` makes artifacts, `runtime` serves them and holds no torch.
#   docker build --target runtime -t infc .
#   docker build --target compile -t infc-compile .

ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS wheel
WORKDIR /src
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm AS runtime
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/cache
RUN useradd --uid 10001 --create-home infc && install --directory --owner infc /cache /work
COPY constraints.txt /wheels/
COPY --from=wheel /wheels/*.whl /wheels/
RUN python -m pip install --constraint /wheels/constraints.txt /wheels/*.whl
USER 10001
WORKDIR /work
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["infc"]
CMD ["serve", "/artifact", "--host", "0.0.0.0"]

FROM runtime AS compile
USER 0
# The compiler of the base image's release, with its security updates.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# From PyTorch's index of CPU wheels: the ones on PyPI bring CUDA along.
RUN python -m pip install --index-url https://download.pytorch.org/whl/cpu --no-deps \
        "$(grep '^torch==' /wheels/constraints.txt)" \
    && python -m pip install --constraint /wheels/constraints.txt "$(ls /wheels/*.whl)[compile]"
USER 10001
HEALTHCHECK NONE
CMD ["--help"]
