# dtrain for NVIDIA GPUs (driver 580 or newer):
#
#   docker build --tag dtrain .
#   docker run --rm --init --gpus all --shm-size 1g --stop-timeout 130 \
#       --user "$(id -u):$(id -g)" --volume "$PWD/data:/dtrain/data" \
#       --volume "$PWD/prepared:/dtrain/prepared" --volume "$PWD/runs:/dtrain/runs" dtrain \
#       torchrun --standalone --nproc_per_node=8 -m dtrain.train --config configs/wmt14-en-de-base.yaml
#
# `docker stop` is a request to save and stop; the same command goes on from there.

# NVIDIA's smallest CUDA image, kept up with Ubuntu's security updates: it ties a container to the
# host's driver and refuses one that is too old. PyTorch's packages bring their own CUDA 13.0
# libraries, so that the larger CUDA images, or PyTorch's, would hold them twice.
FROM nvidia/cuda:13.0.3-base-ubuntu24.04

# The compiler and Python's headers: Triton builds its launchers with them when it first runs.
# Versions are Ubuntu's: a pinned one disappears from its archive with the next update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/dtrain

ENV PATH=/opt/dtrain/bin:$PATH
WORKDIR /dtrain

# The packages before the code: this layer of several GB changes only with the files it copies.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY dtrain/__init__.py dtrain/
RUN pip install --no-cache-dir --constraint constraints.txt --editable .
COPY . .

# Any user may run it, known to the system or not: `docker run --user` is how files in the mounted
# directories get the right owner. Caches that PyTorch and others keep at home then need a place
# and a name, and what is downloaded from the hub stays with the data.
RUN useradd --uid 10001 --no-create-home dtrain \
    && install --directory --mode=1777 data prepared runs
ENV HOME=/tmp USER=dtrain HF_HOME=/dtrain/data/huggingface
USER 10001
CMD ["dtrain", "--help"]
