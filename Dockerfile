# The two commands of the README, in an environment that is ready:
#   docker build -t robust-image-classification .
#   docker run --rm -v "$PWD/runs:/project/runs" robust-image-classification make reproduce-cifs
#   docker run --rm --shm-size 1g robust-image-classification make test
FROM python:3.11-slim

# git: results record the commit, and tests make repositories.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /project
# Wheels for the CPU; for GPUs build with --build-arg TORCH_INDEX= and run with --gpus all.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY . .
RUN make setup TORCH_INDEX="$TORCH_INDEX"
CMD ["make", "help"]
