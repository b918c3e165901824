#!/usr/bin/env bash
# One Slurm job: two nodes train the main agent, one the sub-agent, two sample.   sbatch slurm.sh /shared/cluster.toml
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:INT@600
set -euo pipefail
config=${1:?give the run\'s TOML file, on a shared file system}
# The password, if PostgreSQL wants one, comes by the environment (srun passes it on) or from store.password_file.

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
mgrpo store init "$config" # makes the tables and the run; does nothing when they are there

# train AGENT NODE...: one torchrun per node; a trainer that fails is started again from its last checkpoint
train() {
  local agent=$1 first=$2
  shift
  srun --nodes=$# --ntasks=$# --nodelist="$(IFS=,; echo "$*")" \
    torchrun --nnodes=$# --nproc-per-node=8 --max-restarts=3 --rdzv-id="$SLURM_JOB_ID-$agent" \
    --rdzv-backend=c10d --rdzv-endpoint="$first:29500" -m mgrpo.engine agent "$config" --name "$agent" &
  trainers+=($!)
}

# sample NODE: one worker per GPU, started again when it fails
sample() {
  # shellcheck disable=SC2016  # $gpu and $1 are for the shell on the node
  srun --nodes=1 --ntasks=1 --nodelist="$1" bash -c '
    trap "trap - INT; kill -INT 0" INT
    for gpu in 0 1 2 3 4 5 6 7; do
      (until CUDA_VISIBLE_DEVICES=$gpu mgrpo rollout "$1"; do sleep 5; done) &
    done
    wait' sample "$config" &
  workers+=($!)
}

trainers=() workers=()
train main "${nodes[0]}" "${nodes[1]}"
train sub "${nodes[2]}"
sample "${nodes[3]}"
sample "${nodes[4]}"

# Ten minutes before the time is up all finish their step and save; the same command goes on from there.
trap 'kill -INT "${trainers[@]}" "${workers[@]}" 2>/dev/null' INT
wait "${trainers[@]}" || wait "${trainers[@]}"
kill -INT "${workers[@]}" 2>/dev/null || true
wait
