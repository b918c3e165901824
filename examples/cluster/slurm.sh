#!/usr/bin/env bash
# Run a whole training as one Slurm job: two nodes train the main agent, one trains the sub-agent, two sample.
#     sbatch slurm.sh /shared/cluster.toml
# Run the same command again to continue from the last checkpoints. torchrun listens on every interface of its nodes.
#SBATCH --nodes=5
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=INT@600
set -euo pipefail
config=${1:?expected the TOML file of the run, on a shared file system}

# PostgreSQL's password comes from the environment, which srun passes on, or from store.password_file.
mgrpo store init "$config" # creates the tables and the run; does nothing if they exist

jobs=0
# train AGENT NODE…: start one torchrun on each node; if a rank fails, all restart from their last checkpoint
train() {
  local agent=$1 first=$2
  shift
  srun --nodes=$# --ntasks=$# --nodelist="$(IFS=, && echo "$*")" \
    torchrun --nnodes=$# --nproc-per-node=8 --max-restarts=3 --rdzv-id="$SLURM_JOB_ID-$agent" \
    --rdzv-backend=c10d --rdzv-endpoint="$first:29500" -m mgrpo.engine agent "$config" --name "$agent" &
  jobs=$((jobs + 1))
}

# sample NODE: start one worker per GPU, and restart it when it fails
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

# Ten minutes before the time limit Slurm interrupts all processes, and they save: torchrun gives its ranks 30 seconds.
# If one part fails for good, interrupt the others too.
for ((ended = 0; ended < jobs; ended++)); do
  wait -n || { scancel --signal=INT "$SLURM_JOB_ID" && wait; exit 1; }
done
