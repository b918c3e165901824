# An image with mgrpo, for CPUs or, with the CUDA build of torch, for NVIDIA GPUs. The driver comes from the host.
#
#   docker build --tag mgrpo:cpu .
#   docker build --tag mgrpo:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker run --rm --volume "$PWD":/work mgrpo:cpu sh -c 'mgrpo init sums sums && cd sums && mgrpo train run.toml'
#   docker run --rm --gpus all --ipc host --volume "$PWD":/work mgrpo:cuda mgrpo train run.toml
#
# This file has not been built yet. --ipc host: ranks that share GPUs exchange tensors through shared memory.
FROM python:3.12-slim-bookworm AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip wheel --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=postgres
# A compiler, because Triton compiles a small part of each kernel's launcher on the machine that runs it.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.11,<2.16"
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/mgrpo-*.whl)[$EXTRAS]"
RUN useradd --create-home user && mkdir /work && chown user /work
USER user
WORKDIR /work
CMD ["mgrpo", "--help"]
