"""Pretrain LLaDA.

Use:

    python examples/llada/pt.py --model_name_or_path 50m --tokenizer_name_or_path bpe:8192 \
        --dataset_args "builtin:text" --max_length 256 --max_steps 1000 --output_dir models/text

    accelerate launch examples/llada/pt.py --model_name_or_path GSAI-ML/LLaDA-8B-Base ...
"""

import sys

from dllm.errors import DllmError
from dllm.pipelines.llada import pretrain

if __name__ == "__main__":
    try:
        pretrain(sys.argv[1:])
    except DllmError as error:
        sys.exit(f"{sys.argv[0]}: {error}")
