#!/usr/bin/env bash
# All checks for a machine with CUDA, in this order: tests, kernels, `embed`, then embed, cluster, dedup and train at a realistic size.
# Goals, whose verdicts kernels.py prints: assign and k-means run at 0.6 of the speed of the float16 products alone, and are 1.2 times as
# fast as flash-kmeans 0.3 and cuML. Install both first: pip install "flash-kmeans==0.3.*"; cuML as docs.rapids.ai/install says.
# No CUDA device has run this script so far, and cuML's calls in kernels.py never ran at all. With the CPU in place of the device, all
# else of kernels.py's part for devices has run; so has flash-kmeans 0.3.1, by its torch code instead of its Triton kernels.
# `benchmarks/gpu.sh --small` runs the last part alone at a small size, on any machine.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
if [[ " $* " != *" --small "* ]]; then
  "$python" -m pytest -q -m gpu
  "$python" benchmarks/kernels.py assign kmeans --device cuda
  "$python" benchmarks/embed.py --device cuda --workers 4 8 16
fi
exec "$python" benchmarks/gpu.py "$@"
