"""Sample from LLaDA: a batch of prompts of different lengths, then blanks filled in between given words.

    python examples/llada/generate.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct

Without a model it uses the one that ships inside dllm, whose language is sudoku.
"""

import sys

from dllm.cli.options import Parser, add_settings, given_settings
from dllm.errors import DllmError
from dllm.pipelines import llada
from dllm.sampling.config import ALIASES, EARLY_ANSWER_OPTIONS, LENGTH_OPTIONS, SamplingConfig

OF_PROMPTS = {"gen_length", "steps", "block_length", "early_stop", "length_policy", "early_answer"}
OF_PROMPTS |= {*LENGTH_OPTIONS["daedal"], *EARLY_ANSWER_OPTIONS["prophet"]}
"""What goes with answers after prompts; blanks say themselves where to write."""


def main(argv: list[str]) -> None:
    parser = Parser(description="Batch sampling and fill-in-the-blanks.")
    parser.add_argument("--model_name_or_path", default="builtin:sudoku9")
    add_settings(parser, SamplingConfig, ALIASES)
    arguments = parser.parse_args(argv)
    options = given_settings(arguments, SamplingConfig)

    model = llada.to_device(llada.load_model(arguments.model_name_or_path, dtype="auto"))
    tokenizer = llada.load_tokenizer(arguments.model_name_or_path)
    mask = tokenizer.mask_token

    if arguments.model_name_or_path == "builtin:sudoku9":
        # the model's texts are solved grids, 81 digits in row order, and end-of-text
        prompts = [
            "534678912672195348198342567859761423426853791713924856961537284",
            "278451936643879521159632847917326458826745319435918762592183674",
        ]
        options.setdefault("gen_length", 19)
        puzzle = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
        blanks = [puzzle.replace(".", mask) + str(tokenizer.eos_token)]
    else:
        prompts = [
            [{"role": "user", "content": "Lily can run 12 kilometers per hour for 4 hours. How far does she run?"}],
            [{"role": "user", "content": "Write a short poem about the sea."}],
        ]
        blanks = [
            f"The capital of France is {mask * 2}, and the capital of Italy is {mask * 2}.",
            tokenizer.apply_chat_template(
                [
                    {"role": "user", "content": "Describe the moon."},
                    {"role": "assistant", "content": f"The moon is {mask * 6} night {mask * 3}."},
                ],
                tokenize=False,
            ),
        ]

    print("== continuation of a batch of prompts")
    result = llada.generate(model, tokenizer, prompts, **options)
    for prompt, text in zip(prompts, result.texts, strict=True):
        print(f"{prompt if isinstance(prompt, str) else prompt[0]['content']}\n  -> {text}\n")

    print("== blanks filled in")
    options = {name: value for name, value in options.items() if name not in OF_PROMPTS}
    result = llada.infilling(model, tokenizer, blanks, **options)
    for text, filled in zip(blanks, result.texts, strict=True):
        print(f"{text.replace(mask, '_').removesuffix(str(tokenizer.eos_token))}\n  -> {filled}\n")
    print(f"({result.nfe} forwards, {result.tokens_per_forward:.2f} tokens per forward)")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DllmError as error:
        sys.exit(f"{sys.argv[0]}: {error}")
