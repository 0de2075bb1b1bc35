#!/usr/bin/env bash
# Try deploy/openmpi on this machine: bash deploy/try_openmpi.sh [PYTHON]
# Installs Debian's Open MPI if there is no mpirun (as root), and starts runs of two and four
# processes, one of which is killed, and one preempted; see try_runs.py. A few minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
if ! command -v mpirun > /dev/null; then
  apt-get update
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends openmpi-bin
fi
mpirun --version | head -1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" deploy/try_runs.py openmpi "$folder"
