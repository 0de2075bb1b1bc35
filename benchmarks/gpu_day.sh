#!/usr/bin/env bash
# What one GPU gives, in one call of under 9 minutes: whole steps and decoding beside PyTorch,
# kernels against the dense reference, and where the time of a step goes.
#
#     bash benchmarks/gpu_day.sh [FOLDER [SECONDS]]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu_day} seconds=${2:-360}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 2
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}
timeout $((seconds + 20)) python3 -m benchmarks.gpu_day --out "$out" --seconds "$seconds"
# After the timing: these use the GPU too.
XLA_PYTHON_CLIENT_MEM_FRACTION=0.1 timeout 100 python3 -m benchmarks.kernel_check \
  --out "$out/kernels.json" 2>"$out/kernels.log" || echo "kernels: see $out/kernels.log"
timeout 60 python3 -m benchmarks.profile gpt2_124m --out "$out"
