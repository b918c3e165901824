#!/usr/bin/env bash
# Plain ssh: each agent on a server of its own, rollout workers on the others.   ./ssh.sh /shared/cluster.toml
# Every server has mgrpo installed, and the file, run_dir and the models under the same paths; torchrun listens on every
# interface of its server. Ctrl-C ends all at once; the same command again goes on from the last checkpoints.
set -euo pipefail
config=${1:?expected the TOML file of the run, under the same path on every server}
declare -A trainers=([main]=server-1 [sub]=server-2)
workers=(server-3 server-4)
gpus=8 # of each server

# run SERVER COMMAND…: -tt, so that the command there ends with its ssh here. A password goes by the environment (the
# server's sshd_config says: AcceptEnv MGRPO_STORE_PASSWORD), where store.password_file is not set; not in a command.
run() {
  local server=$1
  shift
  ssh -tt -o BatchMode=yes -o ServerAliveInterval=30 -o SendEnv=MGRPO_STORE_PASSWORD "$server" "$(printf '%q ' "$@")"
}

mgrpo store init "$config" # the tables and the run; nothing where they are there

trap 'trap - EXIT INT TERM; kill 0' EXIT INT TERM
jobs=0
for agent in "${!trainers[@]}"; do
  run "${trainers[$agent]}" torchrun --nnodes=1 --nproc-per-node="$gpus" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint=localhost:0 -m mgrpo.engine agent "$config" --name "$agent" </dev/null &
  jobs=$((jobs + 1))
done
for server in "${workers[@]}"; do
  for ((gpu = 0; gpu < gpus; gpu++)); do
    (until run "$server" env "CUDA_VISIBLE_DEVICES=$gpu" mgrpo rollout "$config" </dev/null; do sleep 5; done) &
    jobs=$((jobs + 1))
  done
done
for ((ended = 0; ended < jobs; ended++)); do
  wait -n # the first that ends in an error ends this script, and with it all
done
trap - EXIT
