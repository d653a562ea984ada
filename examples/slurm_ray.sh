#!/bin/bash
# One Ray cluster over the nodes of a Slurm job, and tailwise on it. Edit the lines that say EDIT; then: sbatch slurm_ray.sh
# If the job ends early, submit it again: finished work is kept.
#SBATCH --job-name=tailwise
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
##SBATCH --gpus-per-node=8   # EDIT: only for embed
set -euo pipefail

CATALOG=/shared/catalog      # EDIT: a folder that all nodes see under this path
source /shared/venv/bin/activate  # EDIT: the same environment on all nodes, with tailwise[ray] and Ray 2.49 or later

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

run() {  # starts Ray on all nodes, runs the command on the first one, and stops Ray
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
        ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
        tailwise "$@" --executor ray --ray-address auto
}

run cluster "$CATALOG" --k 50000 --max-memory 64GB
run dedup "$CATALOG" --epsilon 0.05 --max-memory 64GB
