# gptq in a container.
#
#   docker build -t gptq .                                     for the CPU
#   docker build -t gptq --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#                                                              for NVIDIA GPUs; run it with --gpus all
#   docker run --rm --user "$(id -u)" -v "$PWD:/work" -v gptq-cache:/cache gptq quantize MODEL --out DIR
#
# The versions are those of constraints.txt, torch's included; BASE needs Python 3.11 or newer, or apt to get it.

ARG BASE=python:3.11-slim

FROM python:3.11-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY gptq_cli gptq_cli
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# hadolint ignore=DL3006
FROM ${BASE}
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# A compiler for what torch and Triton compile at run time: kernels on GPUs, and `gptq load --compile`.
# hadolint ignore=DL3008,SC2046
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libc6-dev \
        $(command -v python3 > /dev/null || echo python3-dev python3-venv) \
    && rm -rf /var/lib/apt/lists/*

COPY constraints.txt /opt/constraints.txt
COPY --from=wheel /wheels /opt/wheels
RUN python3 -m venv /opt/gptq \
    && sed -i "s/^torch==.*/${TORCH}/" /opt/constraints.txt \
    && /opt/gptq/bin/pip install --no-cache-dir --constraint /opt/constraints.txt --index-url "${TORCH_INDEX}" \
        --extra-index-url https://pypi.org/simple "${TORCH}" \
    && /opt/gptq/bin/pip install --no-cache-dir --constraint /opt/constraints.txt /opt/wheels/*.whl \
    && /opt/gptq/bin/gptq --version

# Whoever it runs as, --user "$(id -u)" included, may write there.
RUN useradd --uid 10001 gptq && mkdir -p /cache /work && chmod 1777 /cache /work
ENV PATH=/opt/gptq/bin:$PATH \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["gptq"]
CMD ["--help"]
