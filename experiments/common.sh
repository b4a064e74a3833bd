# For the scripts beside it: `run NAME FLAGS...` makes a run of `size` in `logs`, unless it is there or does not match ONLY.
set -euo pipefail
cd "$(dirname "$0")/.."

run() {
    local name=$1
    shift
    [[ $name =~ ${ONLY:-.} ]] || return 0
    compgen -G "$logs/${name}_2*/finished.json" > /dev/null && return 0
    echo "== $name"
    python reproduce_zo_paper.py --run_name "$name" --log_dir "$logs" --model_size "$size" --max_samples 4000 \
        --save_interval 100000 ${THREADS:+--num_threads "$THREADS"} "$@"
}
