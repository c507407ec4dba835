#!/usr/bin/env bash
# Trains with torchrun in the active Python environment. The arguments go to train.py. On several nodes, run the same
# command on each node:
#
#   PROCESSES=8 deploy/torchrun.sh --config configs/coco_r50.yaml --root /path/to/coco --mixed_precision bf16
#   NODES=2 HOST=10.0.0.1:29500 PROCESSES=8 deploy/torchrun.sh --config ...
#
# HOST is the address of one of the nodes. All nodes need access to the data and to the run folder. SIGTERM and Ctrl-C
# save a checkpoint, and the same command resumes from it. Two runs with the same HOST need different ports.
set -euo pipefail
cd "$(dirname "$0")/.."
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds for the last save; PyTorch before 2.12 always waits 30
exec torchrun --nnodes "${NODES:-1}" --nproc_per_node "${PROCESSES:-1}" \
    --rdzv_backend c10d --rdzv_id pix2seq --rdzv_endpoint "${HOST:-localhost:0}" train.py "$@" --resume auto
