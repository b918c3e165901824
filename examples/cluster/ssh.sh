#!/usr/bin/env bash
# Plain ssh, no scheduler: each agent on a server of its own, workers on the rest.   ./ssh.sh /shared/cluster.toml
# Every server has mgrpo installed and the file, run_dir and the models under the same paths. Ctrl-C ends all.
set -euo pipefail
config=${1:?give the run\'s TOML file, under the same path on every server}
declare -A trainer=([main]=server-1 [sub]=server-2)
workers=(server-3 server-4)
gpus=8 # of each server

# run SERVER COMMAND...: with a terminal (-tt), so that the command ends when this script does. The password goes in by
# the environment (SendEnv here, AcceptEnv MGRPO_STORE_PASSWORD in the server's sshd_config), never on a command line;
# or not at all, with store.password_file.
run() {
  local server=$1
  shift
  ssh -tt -o BatchMode=yes -o ServerAliveInterval=30 -o SendEnv=MGRPO_STORE_PASSWORD "$server" "$(printf '%q ' "$@")" </dev/null
}

mgrpo store init "$config" # makes the tables and the run; does nothing when they are there

trap 'trap - INT TERM EXIT; kill 0' INT TERM EXIT
for agent in "${!trainer[@]}"; do
  run "${trainer[$agent]}" torchrun --nnodes=1 --nproc-per-node="$gpus" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint=localhost:0 -m mgrpo.engine agent "$config" --name "$agent" &
  trainers+=($!)
done
for server in "${workers[@]}"; do
  for ((gpu = 0; gpu < gpus; gpu++)); do
    (until run "$server" env CUDA_VISIBLE_DEVICES="$gpu" mgrpo rollout "$config"; do sleep 5; done) &
  done
done
wait "${trainers[@]}" # every agent has taken its steps
trap - EXIT
kill 0
