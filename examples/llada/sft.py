"""Fine-tune LLaDA on conversations.

Use:

    python examples/llada/sft.py --model_name_or_path models/text/checkpoint-final \
        --dataset_args "builtin:addition[train:10000,test:500]" --max_length 64 --output_dir models/addition

    accelerate launch examples/llada/sft.py --model_name_or_path GSAI-ML/LLaDA-8B-Base \
        --dataset_args "allenai/tulu-3-sft-mixture[train:10000,test:1000]" --max_length 1024 ...
"""

import sys

from dllm.errors import DllmError
from dllm.pipelines.llada import sft

if __name__ == "__main__":
    try:
        sft(sys.argv[1:])
    except DllmError as error:
        sys.exit(f"{sys.argv[0]}: {error}")
