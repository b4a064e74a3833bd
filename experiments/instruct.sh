#!/usr/bin/env bash
# The runs of RESULTS.md's section on Instruct: `experiments/instruct.sh tiny` and `experiments/instruct.sh 20M`, in
# logs/instruct/SIZE (LOG_DIR/SIZE). A run that is there is left alone. ONLY=PATTERN limits them; THREADS=N is for two side by side.
. "$(dirname "$0")/common.sh"
size=${1:?tiny or 20M}
logs=${LOG_DIR:-logs/instruct}/$size

alone="--direction gaussian --query_budget_q 0 --optimizer mudamw" # backpropagations and nothing between
if [[ $size == tiny ]]; then
    length="--max_steps 300 --eval_interval 50"
    for seed in 0 1 2; do
        at="--seed $seed $length"
        for rate in 3e-3 1e-2; do run "control_${rate}_$seed" --mode Instruct --bp_interval 5 $alone --learning_rate $rate $at; done
        run "instruct_$seed" --mode Instruct --bp_interval 5 $at
        run "instruct_q8_$seed" --mode Instruct --bp_interval 5 --query_budget_q 8 --parallel_q_computation $at
        run "head_only_$seed" --mode Instruct --bp_interval 5 $alone --learning_rate 3e-3 --head closed_form $at
        run "backpropagation_3e-3_$seed" --mode FO --optimizer mudamw --learning_rate 3e-3 $at
    done
    for interval in 2 10 20; do
        run "interval_${interval}_instruct" --mode Instruct --bp_interval $interval $length
        run "interval_${interval}_control" --mode Instruct --bp_interval $interval $alone --learning_rate 3e-3 $length
    done
else
    length="--max_steps 60 --eval_interval 10 --eval_samples 32"
    run "control_3e-3" --mode Instruct --bp_interval 5 $alone --learning_rate 3e-3 $length
    run "instruct_q10" --mode Instruct --query_budget_q 10 --bp_interval 5 --parallel_q_computation --parallel_batch_size 4 $length
    run "instruct" --mode Instruct --bp_interval 5 $length
    run "backpropagation_3e-3" --mode FO --optimizer mudamw --learning_rate 3e-3 $length
fi
