#!/usr/bin/env bash
# How the model that ships inside dllm was made. One to two hours on one core with avx512_bf16; Ctrl-C and the same command go on.
set -euo pipefail
out=${1:-models/sudoku9}
dllm pretrain --model_name_or_path tiny --config_overrides n_layers=8 \
    --dataset_args "builtin:sudoku9[train:900_000,test:1000]" --max_length 82 \
    --optimizer muon --muon_learning_rate 0.02 --learning_rate 3e-3 --weight_decay 0.01 --warmup_steps 100 \
    --per_device_train_batch_size 128 --per_device_eval_batch_size 100 --max_steps 6000 --random_length 0 --max_time 0.75 \
    --logging_steps 50 --eval_strategy steps --eval_steps 500 --save_steps 250 --torch_compile true \
    --output_dir "$out" --resume_from_checkpoint auto
python examples/sudoku/evaluate.py --model_name_or_path "$out/checkpoint-final"
