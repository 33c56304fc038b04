# longfire in a container, for a CPU or for NVIDIA GPUs:
#
#     docker build --build-arg DEVICE=cpu  -t longfire:cpu .
#     docker build --build-arg DEVICE=cuda -t longfire:cuda .
#     docker run --rm -v "$PWD:/work" longfire:cpu train quickstart
#     docker run --rm --gpus all --ipc=host -v "$PWD:/work" longfire:cuda train quickstart
#
# TORCH_INDEX: a package index that has torch for the device, where the default one has it for another.

FROM python:3.12-slim-bookworm AS build
ARG DEVICE=cpu
ARG TORCH_INDEX=""
WORKDIR /source
RUN python -m venv /opt/longfire
ENV PATH=/opt/longfire/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt ./
# torch comes first and alone: nothing that follows may pull another build of it
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY longfire ./longfire
COPY recipes ./recipes
RUN case "$DEVICE" in \
      cpu) extras=sentencepiece ;; \
      cuda) extras=sentencepiece,cuda ;; \
      *) echo "DEVICE=$DEVICE: cpu or cuda" >&2; exit 2 ;; \
    esac \
    && pip install --constraint constraints.txt ".[$extras]"

FROM python:3.12-slim-bookworm AS run
# torch.compile and triton compile C and C++; git names the revision of a checkout in /work
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/longfire /opt/longfire
ENV PATH=/opt/longfire/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 longfire && mkdir /work && chown longfire /work
USER longfire
WORKDIR /work
ENTRYPOINT ["longfire"]
CMD ["--help"]
