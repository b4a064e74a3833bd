#!/usr/bin/env bash
# Runs the baseline, parallel and large configurations at 20M, one after the other, and stops at the first failure.
#   MAX_STEPS=5 ./test_zo_optimization_batch.sh      a try in minutes
#   LOG_DIR=elsewhere PYTHON=python3.12 ./test_zo_optimization_batch.sh
# Flags given to this script are passed on to every run.
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python}
log_dir=${LOG_DIR:-logs}
common=(--mode ZO --model_size 20M --batch_size 4 --learning_rate 1e-3 --max_samples 500 --log_dir "$log_dir")
if [ -n "${MAX_STEPS:-}" ]; then common+=(--max_steps "$MAX_STEPS"); fi
common+=("$@")

run() {
    local name=$1
    shift
    printf '\n=== %s: %s\n' "$name" "$*"
    if ! "$python" reproduce_zo_paper.py "${common[@]}" --run_name "$name" "$@"; then
        printf '\n=== %s failed; the runs after it were not started\n' "$name" >&2
        exit 1
    fi
}

run baseline_q8 --query_budget_q 8
run parallel_q8 --query_budget_q 8 --parallel_q_computation --parallel_batch_size 4
run large_q32 --query_budget_q 32 --parallel_q_computation --parallel_batch_size 8

printf '\n=== done; the newest run of each configuration:\n'
runs=()
for name in baseline_q8 parallel_q8 large_q32; do
    runs+=("$(ls -d "$log_dir/${name}"_[0-9]* | tail -n 1)")
done
"$python" reproduce_zo_paper.py --log_dir "$log_dir" --compare "${runs[@]}"
