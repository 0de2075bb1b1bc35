#!/usr/bin/env bash
# Try deploy/slurm on this machine: bash deploy/try_slurm.sh [PYTHON]
# As root: installs Debian's Slurm if there is none, starts a cluster of this one node in a folder
# of its own (nothing in /etc is changed), runs jobs of two and four tasks, one of which is killed,
# and one preempted (see try_runs.py), and ends the daemons. A few minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
if ! command -v slurmctld > /dev/null || ! command -v munged > /dev/null; then
  apt-get update
  DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
fi
slurmctld -V

folder=$(mktemp -d)
chmod 755 "$folder"
export SLURM_CONF=$folder/slurm.conf
daemons=()
stop() {
  for daemon in "${daemons[@]}"; do kill "$daemon" 2> /dev/null || true; done
  for daemon in "${daemons[@]}"; do wait "$daemon" 2> /dev/null || true; done
  rm -rf "$folder"
}
trap stop EXIT

mkdir "$folder/state" "$folder/spool"
(umask 077; head -c 1024 /dev/urandom > "$folder/munge.key")
node=$(hostname -s)
cat > "$SLURM_CONF" <<CONF
ClusterName=try
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SlurmdParameters=config_overrides
KillWait=60
JobRequeue=1
NodeName=$node NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=$node Default=YES MaxTime=INFINITE State=UP
CONF

munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munge.pid" --seed-file="$folder/munge.seed" > "$folder/munged.log" 2>&1 &
daemons+=($!)
sleep 1
slurmctld -D > /dev/null 2>&1 & daemons+=($!)
slurmd -D -N "$node" > /dev/null 2>&1 & daemons+=($!)
for _ in $(seq 60); do
  sinfo --noheader --format=%T 2> /dev/null | grep -q idle && break
  sleep 1
done
sinfo

"$python" deploy/try_runs.py slurm "$folder" || { tail -n 40 "$folder"/*.log; exit 1; }
