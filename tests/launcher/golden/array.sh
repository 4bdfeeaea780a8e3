#!/bin/bash
#SBATCH --job-name=mdseq-novels
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1200
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --array=0-3
#SBATCH --partition=h100
#SBATCH --account=books
#SBATCH --output=runs/novels/slurm/%A_%a.log
#SBATCH --open-mode=append

# 4 runs in runs/novels on 4 nodes, 8 GPUs each. docs/clusters.md tells what happens here.
set -euo pipefail
cd -- CHECKOUT
export PYTHONPATH=CHECKOUT"${PYTHONPATH:+:$PYTHONPATH}"
export MDSEQ_NODES="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)"
case "$SLURM_ARRAY_TASK_ID" in
    0) run=runs/novels/seed=0,optimiser.learning_rate=1e-4 overrides=(seed=0 optimiser.learning_rate=1e-4) ;;
    1) run=runs/novels/seed=0,optimiser.learning_rate=3e-4 overrides=(seed=0 optimiser.learning_rate=3e-4) ;;
    2) run=runs/novels/seed=1,optimiser.learning_rate=1e-4 overrides=(seed=1 optimiser.learning_rate=1e-4) ;;
    3) run=runs/novels/seed=1,optimiser.learning_rate=3e-4 overrides=(seed=1 optimiser.learning_rate=3e-4) ;;
esac
on_nodes=(srun --kill-on-bad-exit=1 --cpu-bind=none PYTHON -m launcher.node --ranks 8 --data data/novels)

exec PYTHON -m launcher.supervise --restarts 3 --run "$run" --requeue 300 -- \
    "${on_nodes[@]}" CHECKOUT/launcher/run.py --ds_config ds_configs/zero3_experts.json --spec moe --output "$run" schedule.steps=9 "${overrides[@]}"
