#!/usr/bin/env bash
# The runs of RESULTS.md. `experiments/results.sh tiny` and `experiments/results.sh 20M` make them, one after the other, in
# logs/results/SIZE (LOG_DIR/SIZE); a run that is there is left alone. ONLY=PATTERN limits them to names that match; THREADS=N is for
# two of these side by side.
. "$(dirname "$0")/common.sh"
size=${1:?tiny or 20M}
logs=${LOG_DIR:-logs/results}/$size

cosine="--use_lr_scheduler"
if [[ $size == tiny ]]; then
    for seed in 0 1 2; do
        every="--seed $seed --eval_interval 25"
        run "feedback_$seed" $every $cosine --max_steps 1172
        run "feedback_head_$seed" $every $cosine --head closed_form --max_steps 2344
        run "head_alone_$seed" $every $cosine --head closed_form --direction gaussian --query_budget_q 0 --max_steps 2500
        run "unmeasured_head_$seed" $every $cosine --head closed_form --query_budget_q 0 --max_steps 1953
    done
    run "head_alone_long_0" $cosine --head closed_form --direction gaussian --query_budget_q 0 --max_steps 5859 --eval_interval 50
    many="--direction gaussian --query_budget_q 8 --eval_interval 25"
    run "gaussian_1e-3" $many --learning_rate 1e-3 --max_steps 488
    run "gaussian_3e-3" $many --learning_rate 3e-3 --max_steps 488
    run "gaussian_short_1e-2" $many --learning_rate 1e-2 --max_steps 122
    run "backpropagation" --mode FO --optimizer adam $cosine --max_steps 1953 --eval_interval 25
else
    many="--direction gaussian --query_budget_q 8 --parallel_q_computation"
    for rate in 1e-3 3e-3; do
        run "gaussian_short_$rate" $many --learning_rate $rate --max_steps 20 --eval_interval 5
    done
    first="--mode ZO --query_budget_q 4 --batch_size 4 --learning_rate 1e-3 --parallel_q_computation"
    run "feedback_0" $first --seed 0 --max_steps 355 --eval_interval 10
    run "gaussian_1e-3" $many --learning_rate 1e-3 --max_steps 244 --eval_interval 10
    run "feedback_1" $first --seed 1 --max_steps 355 --eval_interval 10
    run "feedback_2" $first --seed 2 --max_steps 355 --eval_interval 10
fi
