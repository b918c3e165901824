#!/usr/bin/env bash
# One Slurm job: two nodes train the main agent, one the sub-agent, two sample.   sbatch slurm.sh /shared/cluster.toml
# The same command again goes on from the last checkpoints. torchrun listens on every interface of its nodes.
#SBATCH --nodes=5
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=INT@600
set -euo pipefail
config=${1:?expected the TOML file of the run, on a shared file system}

# A password of PostgreSQL comes by the environment, which srun passes on, or from store.password_file.
mgrpo store init "$config" # the tables and the run; nothing where they are there

jobs=0
# train AGENT NODE…: one torchrun on each node; when a rank fails all start again from their last checkpoint
train() {
  local agent=$1 first=$2
  shift
  srun --nodes=$# --ntasks=$# --nodelist="$(IFS=, && echo "$*")" \
    torchrun --nnodes=$# --nproc-per-node=8 --max-restarts=3 --rdzv-id="$SLURM_JOB_ID-$agent" \
    --rdzv-backend=c10d --rdzv-endpoint="$first:29500" -m mgrpo.engine agent "$config" --name "$agent" &
  jobs=$((jobs + 1))
}

# sample NODE: one worker per GPU, started again when it fails
sample() {
  srun --nodes=1 --ntasks=8 --gpus-per-task=1 --nodelist="$1" \
    bash -c 'trap "exit 130" INT TERM; until mgrpo rollout "$1"; do sleep 5; done' worker "$config" &
  jobs=$((jobs + 1))
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
train main "${nodes[0]}" "${nodes[1]}"
train sub "${nodes[2]}"
sample "${nodes[3]}"
sample "${nodes[4]}"

# Ten minutes before its time is up Slurm interrupts all, and they save: torchrun gives its ranks 30 seconds for it.
# When one is given up the others are asked to do the same.
for ((ended = 0; ended < jobs; ended++)); do
  wait -n || { scancel --signal=INT "$SLURM_JOB_ID" && wait; exit 1; }
done
