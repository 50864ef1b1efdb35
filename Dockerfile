# The trainer with the versions of constraints.txt, for NVIDIA GPUs. How to use it: docs/docker.md.
# The CUDA of the base is that of the torch that constraints.txt names (2.13 from PyPI: 13.0), since DeepSpeed compiles its
# operators with the base's nvcc and refuses another major version.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04@sha256:5dc1bca23d05bd37b011be68ec470c03b403a5da07ec3a86e41af9470e9d0cc6

ARG EXTRAS=tracking,hub,adapter

ENV DEBIAN_FRONTEND=noninteractive \
    PATH=/opt/versatune/bin:$PATH \
    PYTHONSAFEPATH=1 \
    TORCH_EXTENSIONS_DIR=/opt/versatune/torch_extensions

# The archive of a release keeps its newest versions only, so these have none.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git iproute2 openssh-client pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/versatune

WORKDIR /versatune_ds

# Dependencies first: a change of the code does not fetch them again.
COPY setup.py pyproject.toml constraints.txt README.md ./
COPY versatune_ds/__init__.py versatune_ds/__init__.py
RUN mkdir kernels && pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]" liger-kernel==0.8.5 ninja \
    && pip uninstall -y versatune-ds

COPY . .
RUN pip install --no-cache-dir --no-deps -c constraints.txt -e . \
    && mkdir -m 1777 "$TORCH_EXTENSIONS_DIR" \
    && versatune-ds --version

CMD ["versatune-ds", "doctor"]
