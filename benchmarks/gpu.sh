#!/usr/bin/env bash
# Embed, cluster, dedup and train on a CUDA device at a realistic size, in under ten minutes; prints a table.
# `benchmarks/gpu.sh --small` runs the same commands at a small size, on any machine.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" benchmarks/gpu.py "$@"
