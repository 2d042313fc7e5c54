"""`dllm convert`: a checkpoint in another dtype, other shards, or with an adapter merged into it."""

from __future__ import annotations

from collections.abc import Sequence

from dllm.cli.options import Parser


def main(argv: Sequence[str]) -> None:
    """Writes a checkpoint anew."""
    parser = Parser(
        prog="dllm convert",
        description="Write a checkpoint anew, in the public format: another dtype, other shards, an adapter merged.",
    )
    parser.add_argument("model_name_or_path", help="folder, hub id or builtin:NAME")
    parser.add_argument("output_dir", help="a folder that does not exist yet")
    parser.add_argument("--dtype", default="auto", help="auto (as it is), float32, bfloat16 or float16")
    parser.add_argument("--max_shard_size", default="5GB", help="larger models become several files and an index")
    parser.add_argument("--adapter", help="a LoRA adapter to merge: folder or hub id")
    arguments = parser.parse_args(list(argv))

    from dllm.pipelines.llada.conversion import convert

    options = {name: getattr(arguments, name) for name in ("dtype", "max_shard_size", "adapter")}
    print(f"Wrote {convert(arguments.model_name_or_path, arguments.output_dir, **options)}")
