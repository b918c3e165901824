#!/usr/bin/env bash
# Run a training over plain ssh: each agent on its own server, rollout workers on the others.
#     ./ssh.sh /shared/cluster.toml
# Every server needs mgrpo, and must see the file, run_dir and the models under the same paths. torchrun listens on every
# interface of its server. Ctrl-C ends everything; run the same command again to continue from the last checkpoints.
set -euo pipefail
config=${1:?expected the TOML file of the run, under the same path on every server}
declare -A trainers=([main]=server-1 [sub]=server-2)
workers=(server-3 server-4)
gpus=8 # on each server

# run SERVER COMMAND…: run a command on a server. -tt makes it end when its ssh ends here. Without store.password_file the
# password is passed in the environment (the server's sshd_config needs AcceptEnv MGRPO_STORE_PASSWORD), never in a command.
run() {
  local server=$1
  shift
  ssh -tt -o BatchMode=yes -o ServerAliveInterval=30 -o SendEnv=MGRPO_STORE_PASSWORD "$server" "$(printf '%q ' "$@")"
}

mgrpo store init "$config" # creates the tables and the run; does nothing if they exist

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
  wait -n # the first error ends this script, and so everything that it started
done
trap - EXIT
