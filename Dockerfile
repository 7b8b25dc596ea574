# Evomerge with CUDA. Build it in the checkout, and run it in the folder of a search file (writable by user id 1000):
#   docker build --tag evomerge .
#   docker run --rm --interactive --tty --gpus all --ipc=host --volume "$PWD:/data" evomerge search search.yaml
# The CUDA libraries come with torch, so the smallest base with the driver's settings will do; --ipc=host is for Ray,
# whose object store lives in shared memory.
FROM nvidia/cuda:13.0.0-base-ubuntu24.04

# wget is for KubeRay, which asks with it whether Ray is well.
# hadolint ignore=DL3008 (Ubuntu keeps no old versions of its packages to pin)
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv wget \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/evomerge
ENV PATH=/opt/evomerge/bin:$PATH PIP_NO_CACHE_DIR=1

WORKDIR /src
# torch is gigabytes: a layer of its own that outlives every change but one of the constraints.
COPY constraints.txt ./
RUN pip install --constraint constraints.txt "$(grep '^torch==' constraints.txt)"
COPY LICENSE README.md pyproject.toml ./
COPY evaluators evaluators
COPY evomerge evomerge
COPY search_spaces search_spaces
RUN pip install --constraint constraints.txt .

USER 1000:1000
WORKDIR /data
ENTRYPOINT ["evomerge"]
CMD ["--help"]
