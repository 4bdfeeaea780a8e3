#!/bin/bash
#SBATCH --job-name=mdseq-novels-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1200
#SBATCH --requeue
#SBATCH --partition=h100
#SBATCH --account=books
#SBATCH --output=runs/novels/slurm/%j.log
#SBATCH --open-mode=append

# evaluates runs/novels. docs/clusters.md tells what happens here.
set -euo pipefail
cd -- CHECKOUT
export PYTHONPATH=CHECKOUT"${PYTHONPATH:+:$PYTHONPATH}"
run=runs/novels
exec PYTHON -m mdseq evaluate likelihood "$run" --data data/novels --output "$run/likelihood-$SLURM_JOB_ID.json"
