#!/bin/bash
#SBATCH --job-name=mdseq-novels-prep
#SBATCH --partition=cpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=512000M
#SBATCH --time=1440
#SBATCH --requeue
#SBATCH --qos=high
#SBATCH --output=runs/novels/slurm/%j.log
#SBATCH --open-mode=append

# makes data/novels of my documents. docs/clusters.md tells what happens here.
set -euo pipefail
cd -- CHECKOUT
module load cuda/12.8
export NCCL_DEBUG="WARN"
export PYTHONPATH=CHECKOUT"${PYTHONPATH:+:$PYTHONPATH}"
exec PYTHON -m data_prep build 'my documents' --out data/novels --workers "$SLURM_CPUS_ON_NODE"
