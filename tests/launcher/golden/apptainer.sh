#!/bin/bash
#SBATCH --job-name=mdseq-novels
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1440
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=runs/novels/slurm/%j.log
#SBATCH --open-mode=append

# trains runs/novels on 1 node, 8 GPUs each. docs/clusters.md tells what happens here.
set -euo pipefail
cd -- CHECKOUT
export PYTHONPATH=CHECKOUT"${PYTHONPATH:+:$PYTHONPATH}"
export MDSEQ_NODES="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)"
run=runs/novels
on_nodes=(srun --kill-on-bad-exit=1 --cpu-bind=none apptainer exec --nv --bind CHECKOUT,CHECKOUT/data/novels,CHECKOUT/runs,/models --pwd CHECKOUT mdseq.sif python3 -m launcher.node --ranks 8 --data data/novels)

exec PYTHON -m launcher.supervise --restarts 3 --run "$run" --requeue 300 -- \
    "${on_nodes[@]}" CHECKOUT/launcher/run.py --ds_config ds_configs/zero3_experts.json --spec moe --output "$run"
