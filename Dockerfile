# docker build -t smpo-fast . && docker run --gpus all -v "$PWD:/work" smpo-fast doctor
# The NVIDIA driver is the host's; PyTorch brings the CUDA libraries that it was built for.
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

# Triton compiles its launcher with gcc and Python's headers when a kernel is first used. Ubuntu keeps the newest build of
# a package alone, so a pinned one could not be installed for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/venv

WORKDIR /opt/smpo_fast
COPY . .
RUN pip install -e .

WORKDIR /work
ENTRYPOINT ["smpo"]
CMD ["--help"]
