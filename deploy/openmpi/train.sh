#!/bin/bash
# Train with Open MPI's mpirun, through killed processes, until the last step:
#
#     deploy/openmpi/train.sh -np 16 --hostfile hosts -- --config llama3_1b name=mine mesh.fsdp=-1 mesh.data=1
#
# Before "--" are the arguments of mpirun, after it those of `jaxgpt train`. One process has one GPU;
# docs/deploy/openmpi.md has more.
set -u
MAX_RESTARTS=${MAX_RESTARTS:-20}
UNFINISHED=75  # the status of a run that a signal stopped after saving
SECONDS_TO_SAVE=${SECONDS_TO_SAVE:-60}

launcher=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do launcher+=("$1"); shift; done
shift

is_stopped= child=
stop() {
  is_stopped=1
  if [ -n "$child" ]; then kill -TERM "$child" 2> /dev/null; fi
}
trap stop TERM INT HUP

for ((restart = 0; restart <= MAX_RESTARTS; restart++)); do
  child=
  # --bind-to none: XLA divides the cores itself. mpirun passes SIGTERM on, and SIGKILL one second
  # later, too early to save; with the timeout it waits as long after a crash as well.
  mpirun --bind-to none --mca odls_base_sigkill_timeout "$SECONDS_TO_SAVE" "${launcher[@]}" \
    ${JAXGPT:-jaxgpt} train --stop-status "$UNFINISHED" "$@" &
  child=$!
  if [ -n "$is_stopped" ]; then stop; fi  # the signal came before this line
  wait "$child"
  status=$?
  if [ -n "$is_stopped" ]; then
    wait "$child"  # the first `wait` ends at the signal, mpirun once the run is saved
    exit $?
  fi
  # 0 is the last step, 2 a wrong setting.
  if [ "$status" -eq 0 ] || [ "$status" -eq 2 ]; then exit "$status"; fi
  echo "mpirun ended with status $status: started again; the run resumes from its checkpoint"
done
exit "$status"
