#!/usr/bin/env bash
# Train on a TPU pod slice of Google Cloud, through queued resources:
#
#     export POD=mine ZONE=us-west4-a TYPE=v5litepod-64 NFS=10.0.0.2:/share
#     deploy/tpu/pod.sh create                    ask for the pod, wait for it, and install jaxgpt
#     deploy/tpu/pod.sh start --config llama3_1b name=mine mesh.fsdp=-1 mesh.data=1
#     deploy/tpu/pod.sh watch                     the output of process 0
#     deploy/tpu/pod.sh stop                      save and end
#     deploy/tpu/pod.sh delete
#
# `start` again goes on from the last checkpoint. `keep`, with the arguments of `start`, does all of
# it, also after preemptions, until the last step is done. docs/deploy/tpu.md has more.
set -euo pipefail
: "${POD:?the name of the pod}" "${ZONE:?its zone}" "${TYPE:?such as v5litepod-64}"
: "${NFS:?host:/path of a folder that all hosts share, such as a Filestore}"
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
PAUSE=${PAUSE:-60}  # seconds between two looks at the pod
UNFINISHED=75       # the status of a run that a signal stopped after saving

on_hosts() {  # all|NUMBER COMMAND
  gcloud compute tpus tpu-vm ssh "$POD" --zone "$ZONE" --worker "$1" --command "$2"
}

state() {
  gcloud compute tpus queued-resources describe "$POD" --zone "$ZONE" \
    --format 'value(state.state)' 2> /dev/null || echo NONE
}

create() {
  gcloud compute tpus queued-resources create "$POD" --node-id "$POD" --zone "$ZONE" \
    --accelerator-type "$TYPE" --runtime-version "$RUNTIME" ${SPOT:+--spot}
  until [ "$(state)" = ACTIVE ]; do
    case "$(state)" in FAILED | SUSPENDED | NONE) echo "$POD: $(state)" >&2; return 1 ;; esac
    sleep "$PAUSE"
  done
  local archive
  archive=$(mktemp -d)/jaxgpt.tar.gz
  git -C "$(dirname "$0")/../.." archive --format tar.gz --output "$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$POD:" --zone "$ZONE" --worker all
  on_hosts all "mkdir -p jaxgpt && tar xzf jaxgpt.tar.gz -C jaxgpt &&
    pip install -q -c jaxgpt/constraints.txt ./jaxgpt 'jax[tpu]' &&
    sudo mkdir -p /runs && sudo mount $NFS /runs"
}

# On every host. The processes find each other by the pod's metadata. They write to files, so that
# the connection may be lost; a run that is still there is stopped first.
start() {
  local arguments
  arguments=$(printf '%q ' "$@")
  stop all
  on_hosts all "rm -f jaxgpt.status jaxgpt.pid
    PATH=\$PATH:\$HOME/.local/bin setsid nohup bash -c '
      jaxgpt train --stop-status $UNFINISHED folder=/runs $arguments & echo \$! > jaxgpt.pid
      wait \$!; echo \$? > jaxgpt.status' >> jaxgpt.log 2>&1 < /dev/null &
    until [ -s jaxgpt.pid ]; do sleep 0.1; done"
}

watch() { on_hosts 0 "tail -n +1 -F jaxgpt.log"; }

# SIGTERM to one process is enough: all of them stop after the same step.
stop() {
  on_hosts "${1:-0}" '
    pid=$(cat jaxgpt.pid 2> /dev/null) || exit 0
    kill -TERM "$pid" 2> /dev/null || exit 0
    while kill -0 "$pid" 2> /dev/null; do sleep 1; done'
}

# The exit status of process 0, "running", "none" before the first start, or "unreachable".
status() {
  on_hosts 0 'cat jaxgpt.status 2> /dev/null ||
    { kill -0 "$(cat jaxgpt.pid 2> /dev/null)" 2> /dev/null && echo running; } || echo none' ||
    echo unreachable
}

delete() {
  gcloud compute tpus queued-resources delete "$POD" --zone "$ZONE" --force --quiet
}

keep() {
  local last
  while true; do
    case "$(state)" in
      ACTIVE) ;;
      NONE) create ;;
      FAILED | SUSPENDED) delete; continue ;;  # preempted
      *) sleep "$PAUSE"; continue ;;
    esac
    last=$(status)
    case "$last" in
      0) echo "$POD: done"; return ;;
      2) on_hosts 0 "tail -n 3 jaxgpt.log" >&2; return 2 ;;  # a wrong setting
      running | unreachable) sleep "$PAUSE" ;;
      *) echo "$POD: status $last: started"; start "$@"; sleep "$PAUSE" ;;
    esac
  done
}

"$@"
