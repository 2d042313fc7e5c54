"""`dllm adapt`: an autoregressive checkpoint of the Llama family becomes a LLaDA checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from dllm.cli.options import Parser


def main(argv: Sequence[str]) -> None:
    """Adapts a checkpoint."""
    parser = Parser(
        prog="dllm adapt",
        description="Make a LLaDA checkpoint of an autoregressive one: the same weights, seen from both sides, and a mask token.",
    )
    parser.add_argument("source", help="folder, hub id or .gguf file of a model of the Llama family")
    parser.add_argument("--output_dir", required=True, help="a folder that does not exist yet")
    parser.add_argument("--dtype", default="auto", help="auto (as it is), float32, bfloat16 or float16")
    arguments = parser.parse_args(list(argv))

    from dllm.pipelines.llada.adapt import adapt

    print(f"Wrote {adapt(arguments.source, arguments.output_dir, dtype=arguments.dtype)}")
