#!/usr/bin/env bash
# Trains on the nodes of a Slurm allocation, one launcher a node:
#
#   sbatch --nodes=2 --gres=gpu:8 scripts/train.slurm.sh --accelerate_config deepspeed_zero2 \
#       --script_path examples/llada/sft.py --max_length 1024 ...
#
# Nothing here needs to be edited: options of sbatch (--partition, --account, --qos, --time, --cpus-per-gpu ...) stand before the
# script's name and win over the lines below. All options: bash scripts/train.slurm.sh --help; more: docs/slurm.md.
#
#SBATCH --job-name=dllm-train
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail
trap '' USR1 # until Python, which takes this process over, listens

# sbatch runs a copy of this file from a folder of its own; the project is where sbatch was called
project=${SLURM_SUBMIT_DIR:-$PWD}
words=("$@")
for ((i = 0; i < $#; i++)); do
    case ${words[i]} in
        --) break ;;
        --project_dir=*) project=${words[i]#*=} ;;
        --project_dir) project=${words[i + 1]:-} ;;
    esac
done
cd -- "$project" || exit 2

# conda's base counts as none: some clusters enter it at login
if [[ -z ${VIRTUAL_ENV:-} && ${CONDA_DEFAULT_ENV:-base} == base && -f .venv/bin/activate ]]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
python=$(command -v python || command -v python3) || {
    echo "train.slurm.sh: there is no Python: enter an environment before sbatch, or make $project/.venv." >&2
    exit 2
}
if ! "$python" -c 'import dllm'; then
    echo "train.slurm.sh: $python has no dllm: enter its environment before sbatch, or give --project_dir with its .venv." >&2
    exit 2
fi
exec "$python" -m dllm.training.slurm "$@"
