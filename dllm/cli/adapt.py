"""`dllm adapt`: an autoregressive checkpoint of the Llama family becomes a LLaDA checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from dllm.cli.options import Parser

OPTIONS = ("gguf_file", "mask_token", "dtype", "max_shard_size")


def main(argv: Sequence[str]) -> None:
    """Adapts a checkpoint."""
    parser = Parser(
        prog="dllm adapt",
        description="Make a LLaDA checkpoint of an autoregressive one (model type llama, mistral or qwen2): the same weights, "
        "seen from both sides, and a mask token. It writes text after some training: docs/adapting.md.",
    )
    parser.add_argument("source", help="folder, hub id or .gguf file of the model")
    parser.add_argument("--output_dir", required=True, help="a folder that does not exist yet")
    parser.add_argument("--gguf_file", metavar="NAME", help="which GGUF file of the folder or hub id")
    parser.add_argument(
        "--mask_token",
        default="auto",
        metavar="TOKEN",
        help="auto (a mask that is declared, else a reserved token of the vocabulary, else a new one), reserved, append (a new "
        "one), or a token of the vocabulary",
    )
    parser.add_argument(
        "--dtype", default="auto", help="auto (as it is; float32 of a GGUF file), float32, bfloat16 or float16"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="larger models become several files and an index")
    arguments = parser.parse_args(list(argv))

    from dllm.pipelines.llada.adaptation import adapt

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        done = adapt(
            arguments.source,
            arguments.output_dir,
            say=lambda line: print(line, flush=True),
            **{name: getattr(arguments, name) for name in OPTIONS},
        )
    templates = {
        "marked": "the source's, marked for fine-tuning",
        "source": "the source's, not marked",
        "llada": "LLaDA's",
        "none": "none",
    }
    print(f"{done.parameters:,} parameters, {done.rows:,} rows of embedding")
    print(f"mask           {done.mask.token} ({done.mask.id}, {done.mask.how})")
    print(f"end of text    {done.eos}")
    print(f"end of turn    {done.eot or 'the same'}")
    print(f"chat template  {templates[done.chat_template]}")
    for warning in said:
        if issubclass(warning.category, UserWarning):
            print(f"Note: {warning.message}")
    print(f"Wrote {done.folder}. It has yet to learn to fill masks:")
    print(
        f"dllm pretrain --model_name_or_path {done.folder} --continue_from_weights --dataset_args DATA --output_dir OUT"
    )
