#!/usr/bin/env bash
# Several hosts under SLURM, one process a GPU. Set nodes, GPUs and time to your cluster's; then
#
#     sbatch scripts/slurm.sh --config configs/moe_3_8b.py --run_dir SHARED_FOLDER/run --parallel.fsdp 8 \
#         --train.micro_batches 256 --data.path ...
#
# All arguments go to train_jax.py. The run folder, the data and this clone must be on a file system that all hosts
# share. In the log, from the first process alone:
#
#     mesh: data 2 x fsdp 8 x expert 1 on 16 devices, 16 processes
#
# then a line every log.every steps. A second job with the same arguments resumes from the last checkpoint; the signal
# below lets a job that runs out of time save one first. This script was not run on a cluster.
#SBATCH --job-name=jax-huginn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# One process a host with all its GPUs instead: --ntasks-per-node=1, and all of the host's cores for it.
exec srun --kill-on-bad-exit=1 python train_jax.py "$@"
