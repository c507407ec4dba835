#!/usr/bin/env bash
# Trains with torchrun, with the project's environment active. Words go to train.py; on several nodes, the same line on
# each:
#
#   PROCESSES=8 deploy/torchrun.sh --config configs/coco_r50.yaml --root /path/to/coco --mixed_precision bf16
#   NODES=2 HOST=10.0.0.1:29500 PROCESSES=8 deploy/torchrun.sh --config ...
#
# HOST is one of the nodes, where they find each other. All have to see the data and the run's folder. SIGTERM and
# Ctrl-C save; the same line goes on. Two runs on the same HOST need different ports.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds a launcher lets the save take; PyTorch before 2.12 has 30 at most
exec torchrun --nnodes "${NODES:-1}" --nproc_per_node "${PROCESSES:-1}" \
    --rdzv_backend c10d --rdzv_id pix2seq --rdzv_endpoint "${HOST:-localhost:0}" train.py "$@" --resume auto
