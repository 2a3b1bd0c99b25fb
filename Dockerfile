# megatron_vl for NVIDIA GPUs: CUDA 13 build of torch, Transformer Engine compiled against it.
#
#     docker build -t megatron-vl .
#     docker run --gpus all --ipc=host -v "$PWD/runs:/app/runs" megatron-vl python -m megatron_vl --help
#
# This file has never been built or run: the project was developed on machines without a GPU or Docker, and the
# versions below follow from what the packages declare. Reports are welcome.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

# Ubuntu 24.04 has Python 3.12. The compiler, the CUDA headers and Python's are for Transformer Engine's build.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential cmake git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv
ENV PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv

# 1. torch first: step 3 compiles against the one that is installed.
RUN pip install --no-cache-dir torch==2.13.0
# 2. what that build needs and, without isolation, does not fetch itself.
RUN pip install --no-cache-dir wheel packaging setuptools pybind11 ninja

WORKDIR /app
COPY . .
# 3. without build isolation, which would download another torch and build against that. NVTE_FRAMEWORK keeps
#    it to PyTorch, MAX_JOBS bounds memory.
RUN NVTE_FRAMEWORK=pytorch MAX_JOBS=8 pip install --no-cache-dir --no-build-isolation '.[dali,cuda,test]'

CMD ["python", "-m", "megatron_vl", "--help"]
