#!/bin/bash
# Embeddings in the parts of a Slurm array, without Ray: sbatch slurm_parts.sh
# Each task embeds its share. Then run the last line's command, or let Slurm do so:
#   job=$(sbatch --parsable slurm_parts.sh); sbatch --dependency=afterok:$job --gpus=1 --wrap "tailwise embed …"
# A task that failed can be submitted again alone: sbatch --array=5 slurm_parts.sh
#SBATCH --job-name=tailwise-embed
#SBATCH --array=1-64
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
set -euo pipefail

CATALOG=/shared/catalog      # EDIT: a folder that all nodes see under this path
PARTS=64                     # EDIT: as in --array; not SLURM_ARRAY_TASK_COUNT, which is smaller when a few tasks are repeated
source /shared/venv/bin/activate  # EDIT

tailwise embed "$CATALOG" --encoder open_clip:ViT-B-32/datacomp_xl_s13b_b90k --column image --part "$SLURM_ARRAY_TASK_ID/$PARTS"
