# Two images: `compile` makes artifacts, `runtime` serves them and holds neither torch nor a compiler.
#   docker build --target runtime -t infc .
#   docker build --target runtime --build-arg EXTRAS=[cuda] -t infc:cuda .
#   docker build --target compile -t infc-compile .
# Both run with a read-only root: they write to /cache and /tmp alone, and to the folder they start in.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ARG EXTRAS=""
WORKDIR /src
COPY . .
RUN python -m pip wheel --no-deps --wheel-dir /wheels . \
    && cp constraints.txt /wheels/ \
    && python -m venv --without-pip /opt/infc \
    && python -m pip --python /opt/infc/bin/python install --constraint /wheels/constraints.txt \
        "$(ls /wheels/*.whl)${EXTRAS}"

FROM python:${PYTHON}-slim-bookworm AS runtime
# No home: nothing may depend on one. Files of the user are those of the group 0 too, as OpenShift
# starts containers with a user of its own.
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin infc \
    && install --directory --owner infc --group 0 --mode 0770 /cache /work
COPY --from=build /opt/infc /opt/infc
ENV PATH=/opt/infc/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/cache
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
COPY --from=build /wheels /wheels
# From PyTorch's index of CPU wheels: the ones on PyPI bring CUDA along.
ENV PIP_PYTHON=/opt/infc/bin/python PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN /usr/local/bin/pip install --index-url https://download.pytorch.org/whl/cpu --no-deps \
        "$(grep '^torch==' /wheels/constraints.txt)" \
    && /usr/local/bin/pip install --constraint /wheels/constraints.txt "$(ls /wheels/*.whl)[compile]"
USER 10001
HEALTHCHECK NONE
CMD ["--help"]
