#!/bin/bash
#SBATCH --job-name=mdseq-novels
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=512000M
#SBATCH --time=1440
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --qos=high
#SBATCH --output=runs/novels/slurm/%j.log
#SBATCH --open-mode=append
#SBATCH '--constraint=a100&ib'
#SBATCH --exclude=n13

# trains runs/novels on 2 nodes, 4 GPUs each. docs/clusters.md tells what happens here.
set -euo pipefail
cd -- CHECKOUT
module load cuda/12.8
export NCCL_DEBUG="WARN"
export PYTHONPATH=CHECKOUT"${PYTHONPATH:+:$PYTHONPATH}"
export MDSEQ_NODES="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)"
run=runs/novels
on_nodes=(srun --kill-on-bad-exit=1 --cpu-bind=none '--container-image=registry#team/mdseq:1.0' --container-mounts=CHECKOUT:CHECKOUT,CHECKOUT/data/novels:CHECKOUT/data/novels,CHECKOUT/runs:CHECKOUT/runs,/models:/models --container-workdir=CHECKOUT python3 -m launcher.node --ranks 4 --network ib0 --scratch '$TMPDIR' --data data/novels)

exec PYTHON -m launcher.supervise --restarts 0 --run "$run" --requeue 120 -- \
    "${on_nodes[@]}" CHECKOUT/launcher/run.py --ds_config ds_configs/zero3_experts.json --spec moe --preflight --output "$run"
