# llamajax in a container.
#   docker build -t llamajax .                             for CPUs
#   docker build -t llamajax:cuda --build-arg EXTRA=cuda . for NVIDIA GPUs; the host needs the driver alone
#   docker run --rm -v "$PWD":/work llamajax prepare --input=book.txt --tokenizer=train:4096 --output=data/mine
#   docker run --rm --gpus=all --shm-size=8g --stop-timeout=300 -v "$PWD":/work llamajax:cuda \
#       train --config=my_text --workdir=runs/mine
# `docker stop` sends SIGTERM: the run saves, and the same command continues.
FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY configs configs
COPY llamajax llamajax
RUN pip wheel --no-cache-dir --no-deps --wheel-dir=/wheels .

FROM python:3.13-slim
ARG EXTRA=""
COPY --from=build /wheels /wheels
# The cuda extra brings CUDA, cuDNN and NCCL as packages.
RUN pip install --no-cache-dir "llamajax${EXTRA:+[$EXTRA]} @ file://$(ls /wheels/*.whl)" && rm -r /wheels
# The container toolkit of the host then makes the driver and its tools visible.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["llamajax"]
CMD ["--help"]
