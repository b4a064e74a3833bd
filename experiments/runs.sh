#!/usr/bin/env bash
# The runs of RESULTS.md: `experiments/runs.sh tiny|20M|200M|instruct|other|paper|tasks` makes a group of them, one after the other, in logs/GROUP
# (LOG_DIR/GROUP). A run that is there is left alone. ONLY=PATTERN limits them to names that match, SEEDS="0 1" the seeds, THREADS=1 is
# for two of these side by side. The tables and the picture: python experiments/report.py runs logs/GROUP docs/PICTURE.png
set -euo pipefail
cd "$(dirname "$0")/.."
group=${1:?tiny, 20M, 200M, instruct, other, paper or tasks}
logs=${LOG_DIR:-logs}/$group

run() { # NAME FLAGS...
    local name=$1
    shift
    [[ $name =~ ${ONLY:-.} ]] || return 0
    compgen -G "$logs/${name}_2*/finished.json" > /dev/null && return 0
    echo "== $name"
    python reproduce_zo_paper.py --run_name "$name" --log_dir "$logs" --save_interval 100000 \
        ${THREADS:+--num_threads "$THREADS"} "$@"
}

standard_library() { # FOLDER: the sources of Python's own library, without its tests, as stdlib.jsonl
    mkdir -p "$1"
    python - "$1/stdlib.jsonl" << 'END'
import json, pathlib, sys, sysconfig

root = pathlib.Path(sysconfig.get_paths()["stdlib"])
found = [path for pattern in ("*.py", "[a-z]*/*.py") for path in sorted(root.glob(pattern))]
sources = [path for path in found if "site-packages" not in str(path) and "test" not in str(path)]
with open(sys.argv[1], "w") as file:
    file.writelines(json.dumps({"text": path.read_bytes().decode("utf-8", "replace")}) + "\n" for path in sources)
END
}

for seed in ${SEEDS:-0 1 2}; do
    case $group in
        tiny)
            every="--seed $seed --max_samples 4000 --max_steps 1953 --use_lr_scheduler --warmup_steps 20 --eval_interval 50"
            for q in 1 0 2 4; do run "branch_q${q}_$seed" --direction feedback --carry branch --query_budget_q $q $every; done
            for q in 1 0; do run "stream_q${q}_$seed" --direction feedback --carry stream --query_budget_q $q $every; done
            run "block_$seed" --direction feedback --carry block $every
            run "fo_$seed" --mode FO $every
            ;;
        20M)
            every="--model_size 20M --seed $seed --max_samples 4000 --max_steps 400 --use_lr_scheduler --warmup_steps 20"
            every="$every --eval_interval 25 --eval_samples 24"
            for carry in branch stream; do
                for q in 1 0; do run "${carry}_q${q}_$seed" --direction feedback --carry $carry --query_budget_q $q $every; done
            done
            for rate in 1e-3 4e-4 2.5e-3; do
                run "block_${rate}_$seed" --direction feedback --carry block --learning_rate $rate $every
                run "fo_${rate}_$seed" --mode FO --learning_rate $rate $every
            done
            ;;
        200M)
            every="--model_size 200M --seed $seed --max_samples 4000 --max_steps 200 --use_lr_scheduler --warmup_steps 20"
            every="$every --eval_interval 20 --eval_samples 24"
            for rate in 1e-3 3e-4; do
                run "block_${rate}_$seed" --direction feedback --carry block --learning_rate $rate $every
                run "fo_${rate}_$seed" --mode FO --learning_rate $rate $every
            done
            ;;
        instruct)
            every="--seed $seed --max_samples 4000 --max_steps 300 --eval_interval 50"
            alone="--mode Instruct --bp_interval 5 --direction gaussian --query_budget_q 0"
            for rate in 3e-3 1e-2; do run "control_${rate}_$seed" $alone --learning_rate $rate $every; done
            run "instruct_$seed" --mode Instruct --bp_interval 5 $every
            run "instruct_stream_$seed" --mode Instruct --bp_interval 5 --query_budget_q 1 $every
            run "fo_mudamw_$seed" --mode FO --optimizer mudamw --learning_rate 3e-3 $every
            ;;
        other)
            every="--dataset $logs/stdlib.jsonl --seed $seed --max_steps 600 --use_lr_scheduler --warmup_steps 20 --eval_interval 100"
            [[ -e $logs/stdlib.jsonl ]] || standard_library "$logs"
            run "block_$seed" --direction feedback $every
            for carry in branch stream; do run "${carry}_q1_$seed" --direction feedback --carry $carry --query_budget_q 1 $every; done
            run "head_$seed" --direction gaussian --query_budget_q 0 --head closed_form --head_learning_rate 1e-3 $every
            run "fo_$seed" --mode FO $every
            ;;
        paper)
            every="--seed $seed --max_samples 120 --eval_interval 34" # an epoch is 170 steps; the stages are six of them
            layers="--scope layerwise $every" # vanilla SGD on both sides, but where another optimizer is named
            for rate in 0.1 0.3 1 3; do
                run "fo_layer_sgd_${rate}_$seed" --mode FO --stage_learning_rates "1,$rate" $layers
                run "fo_full_sgd_${rate}_$seed" --mode FO --optimizer sgd --clip_grad_norm 0 --learning_rate "$rate" --epochs 6 $every
                run "fo_reduced_sgd_${rate}_$seed" --mode FO --scope reduced --optimizer sgd --clip_grad_norm 0 --learning_rate "$rate" --epochs 6 $every
            done
            for rate in 1e-3 3e-4 3e-3; do
                run "fo_layer_adam_${rate}_$seed" --mode FO --stage_optimizers adam --stage_learning_rates "3e-3,$rate" $layers
                run "fo_full_adam_${rate}_$seed" --mode FO --learning_rate "$rate" --epochs 6 $every
                run "zo_layer_adam_${rate}_$seed" --stage_optimizers adam --stage_learning_rates "3e-3,$rate" $layers
            done
            run "zo_layer_control_$seed" --query_budget_q 1 --stage_learning_rates 1,1e-12 $layers # blocks stay as they begin
            for rate in 1e-4 3e-4 1e-3 3e-3; do run "zo_layer_q1_${rate}_$seed" --query_budget_q 1 --stage_learning_rates "1,$rate" $layers; done
            for rate in 3e-4 1e-3 3e-3 1e-2; do run "zo_layer_q8_${rate}_$seed" --stage_learning_rates "1,$rate" $layers; done
            for rate in 1e-3 3e-3 1e-2; do run "zo_layer_q32_${rate}_$seed" --query_budget_q 32 --stage_learning_rates "1,$rate" $layers; done
            for rate in 1e-3 3e-3; do run "zo_reduced_q8_${rate}_$seed" --scope reduced --learning_rate "$rate" --epochs 6 $every; done
            run "zo_full_q8_3e-3_$seed" --learning_rate 3e-3 --epochs 6 $every
            large="--model_size 20M-paper --max_samples 4000 --eval_samples 24 --eval_interval 20 --stage_steps 60,20"
            run "20M_fo_layer_sgd_0.3_$seed" --scope layerwise --mode FO --seed "$seed" $large --stage_learning_rates 0.3,0.3
            run "20M_zo_layer_q8_1e-3_$seed" --scope layerwise --seed "$seed" $large --stage_learning_rates 0.3,1e-3 --parallel_q_computation
            ;;
        tasks) # models/SmolLM2-135M: experiments/smollm2.py; LOGS/sentiment.jsonl: experiments/sentiment.py
            every="--init_from models/SmolLM2-135M --dataset $logs/sentiment.jsonl --completion_column completion --without_eos --seed $seed"
            every="$every --eval_metric accuracy --block_size 96 --batch_size 16 --dtype bfloat16 --eval_samples 458"
            eight="--query_budget_q 8 --parallel_q_computation --max_steps 50 --eval_interval 25 $every"
            half="--max_steps 25" # an example is shown with both answers: the same number of tokens
            run "lowrank_q8_1e-4_$seed" --direction lowrank --learning_rate 1e-4 $eight
            run "mezo_q1_1e-5_$seed" --query_budget_q 1 --parallel_q_computation --learning_rate 1e-5 --max_steps 400 --eval_interval 200 $every
            run "fo_1e-5_$seed" --mode FO --learning_rate 1e-5 --max_steps 100 --eval_interval 25 $every
            run "lora_adam_1e-2_$seed" --scope lora:8 --optimizer adam --learning_rate 1e-2 $eight
            run "feedback_1e-4_$seed" --direction feedback --learning_rate 1e-4 --max_steps 50 --eval_interval 25 $every
            run "lowrank_accuracy_1e-3_$seed" --direction lowrank --objective accuracy --learning_rate 1e-3 $eight $half
            run "lowrank_q8_3e-4_$seed" --direction lowrank --learning_rate 3e-4 $eight
            run "aligned_1e-2_$seed" --direction aligned --learning_rate 1e-2 $eight
            run "mezo_q1_3e-6_$seed" --query_budget_q 1 --parallel_q_computation --learning_rate 3e-6 --max_steps 400 --eval_interval 200 $every
            run "fo_3e-5_$seed" --mode FO --learning_rate 3e-5 --max_steps 100 --eval_interval 25 $every
            run "lora_adam_3e-2_$seed" --scope lora:8 --optimizer adam --learning_rate 3e-2 $eight
            run "feedback_3e-5_$seed" --direction feedback --learning_rate 3e-5 --max_steps 50 --eval_interval 25 $every
            run "lowrank_accuracy_3e-4_$seed" --direction lowrank --objective accuracy --learning_rate 3e-4 $eight $half
            ;;
    esac
done
