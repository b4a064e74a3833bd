#!/usr/bin/env bash
# The paper's experiment: the whole model and layer by layer, first order and zeroth order; then its table and picture, table.md and
# paper.png. `SEEDS=0 experiments/paper.sh tiny` is one seed of the small one, `experiments/paper.sh 20M` the full size, for a GPU. In
# logs/paper/SIZE (LOG_DIR/SIZE); a run that is there is left alone. ONLY=PATTERN limits them, SEEDS="0 1" the seeds; THREADS=1 is for
# two of these side by side, which on two cores is twice as fast as one after the other.
. "$(dirname "$0")/common.sh"
size=${1:?tiny or 20M}
logs=${LOG_DIR:-logs/paper}/$size

if [[ $size == tiny ]]; then
    data="--max_samples 120 --eval_interval 34" # an epoch is 170 steps
    epochs=6
else
    data="--dataset cosmopedia-100k --max_samples 2000 --batch_size 16 --block_size 512 --eval_interval 50"
    epochs=10
fi

layers="--scope layerwise" # two epochs for the embedding, one for each block
whole="--epochs $epochs"
for seed in ${SEEDS:-0 1 2}; do
    every="$data --seed $seed --use_lr_scheduler"
    first="--mode FO --optimizer adam --learning_rate 1e-3"
    random="--direction gaussian --query_budget_q 8 --learning_rate 3e-3"
    lowrank="--direction lowrank --query_budget_q 8 --learning_rate 3e-3 --parallel_q_computation"
    run "fo_layerwise_$seed" $every $first $layers
    run "fo_full_$seed" $every $first $whole
    run "feedback_layerwise_$seed" $every $layers
    run "feedback_full_$seed" $every $whole
    run "zo_layerwise_$seed" $every $random $layers
    run "zo_full_$seed" $every $random $whole
    run "lowrank_layerwise_$seed" $every $lowrank $layers
    run "lowrank_full_$seed" $every $lowrank $whole
done

if compgen -G "$logs/*_layerwise_*/finished.json" > /dev/null; then
    python experiments/paper_report.py "$logs" "$logs/paper.png" | tee "$logs/table.md"
fi
