"""LLaDA's tokenizers: the special tokens, the chat template, and two tokenizers that are made here.

Public checkpoints list the mask only as an additional token, and Base ones may split the chat markers into subwords; what
`load_tokenizer` returns has each as one token, under a name: `mask_token_id`, `eos_token_id`, `pad_token_id`,
`bos_token_id`, `eot_token_id`.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dllm.data.maps import marks_answers
from dllm.errors import CheckpointError, first_line
from dllm.pipelines.llada.embedded import resolve

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
HEADER_START, HEADER_END, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
ROLE_END = "<|role_end|>"
"""How LLaDA-MoE ends a turn; its checkpoints bring their own chat template."""
MARKERS = (HEADER_START, HEADER_END, EOT, ROLE_END)
"""What stands in LLaDA's chat templates."""
SPECIAL_TOKENS = (BOS, EOS, MASK, HEADER_START, HEADER_END, EOT)
MASK_SPELLINGS = (MASK, "<|mask|>", "[MASK]")
"""How mask tokens are spelt where a tokenizer does not declare one."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    f"{{{{ '{HEADER_START}' + message['role'] + '{HEADER_END}\\n\\n' }}}}"
    "{% if message['role'] == 'assistant' %}"
    f"{{% generation %}}{{{{ message['content'] | trim + '{EOT}' }}}}{{% endgeneration %}}"
    "{% else %}"
    f"{{{{ message['content'] | trim + '{EOT}' }}}}"
    "{% endif %}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{HEADER_START}assistant{HEADER_END}\\n\\n' }}}}{{% endif %}}"
)
"""bos, then header, two newlines, the stripped content and end-of-turn for each message. The generation prompt comes only
when it is asked for, and what the assistant says is marked, its end-of-turn included."""


def load_tokenizer(name_or_path: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, ready for LLaDA.

    Args:
        name_or_path: a folder, a hub id, or `builtin:NAME`.
        **kwargs: passed to `AutoTokenizer.from_pretrained`.

    Raises:
        CheckpointError: there is no tokenizer there, or it lacks a token that LLaDA needs.
    """
    import dllm.pipelines.llada.models.configuration_llada  # noqa: F401  transformers reads model_type before the tokenizer

    path = resolve(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **kwargs)
    except (OSError, ValueError) as error:
        raise no_tokenizer(name_or_path, error) from error
    return prepare_tokenizer(tokenizer, str(name_or_path))


def no_tokenizer(name_or_path: str | Path, error: Exception) -> CheckpointError:
    """What went wrong with a checkpoint's tokenizer, of which transformers says something else where a folder has none.

    Args:
        name_or_path: as the user wrote it.
        error: of transformers.
    """
    folder = Path(resolve(name_or_path)).expanduser()
    cause = first_line(error)
    if folder.is_dir() and not any(
        any(folder.glob(files)) for files in ("tokenizer.json", "*.model", "vocab*", "*.gguf")
    ):
        cause = "the folder has no tokenizer.json or tokenizer.model. Copy the files of the model's tokenizer into it."
    return CheckpointError(f"No tokenizer could be loaded from {str(name_or_path)!r}: {cause}")


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """Names the special tokens, makes each one token, and gives LLaDA's chat template where its markers are in the vocabulary
    and the template there is does not mark what the assistant says.

    An end of turn that the tokenizer names itself stays.

    Raises:
        CheckpointError: no end-of-text or no mask token.
    """
    vocabulary = tokenizer.get_vocab()
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"The tokenizer of {name!r} has no end-of-text token (eos_token): LLaDA joins and pads with it."
        )
    if tokenizer.mask_token_id is None:
        spelt = next((token for token in MASK_SPELLINGS if token in vocabulary), None)
        if spelt is None:
            raise CheckpointError(
                f"The tokenizer of {name!r} has no mask token: none is declared, and none of {', '.join(MASK_SPELLINGS)} is in "
                f"its vocabulary. Is this a LLaDA checkpoint?"
            )
        tokenizer.add_special_tokens({"mask_token": spelt})  # a name alone would leave it split into subwords
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.bos_token_id is None and BOS in vocabulary:
        tokenizer.add_special_tokens({"bos_token": BOS})
    dense, mixture = (HEADER_START, HEADER_END, EOT), (ROLE_END,)
    markers = next((family for family in (dense, mixture) if vocabulary.keys() >= set(family)), ())
    if any(len(tokenizer(marker, add_special_tokens=False)["input_ids"]) != 1 for marker in markers):
        tokenizer.add_special_tokens({"extra_special_tokens": list(markers)}, replace_extra_special_tokens=False)
    named = getattr(tokenizer, "eot_token", None)
    if markers == dense and not marks_answers(tokenizer) and str(named or EOT) == EOT:
        tokenizer.chat_template = CHAT_TEMPLATE
    if markers and named is None:
        tokenizer.eot_token, tokenizer.eot_token_id = markers[-1], vocabulary[markers[-1]]
    return tokenizer


def name_end_of_turn(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Makes a token of the vocabulary `eot_token`, which no marker of LLaDA's says; it is written with the tokenizer."""
    tokenizer.init_kwargs["eot_token"] = (
        token  # tokenizer_config.json's; transformers reads any KEY_token there as a name
    )
    tokenizer.eot_token, tokenizer.eot_token_id = token, tokenizer.convert_tokens_to_ids(token)


def char_tokenizer() -> PreTrainedTokenizerBase:
    """One token a character: printable ASCII and newline; anything else is <|unk|>. For puzzles and sums."""
    characters = [*string.digits, *string.ascii_letters, *string.punctuation, " ", "\n"]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, "<|unk|>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, unk_token="<|unk|>")


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on `texts`.

    Args:
        texts: documents.
        vocab_size: entries, special tokens included; at least 262 (the bytes and the special tokens).

    Raises:
        CheckpointError: vocab_size is too small.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIAL_TOKENS):
        raise CheckpointError(
            f"bpe:{vocab_size} is too small: {len(alphabet) + len(SPECIAL_TOKENS)} entries hold the bytes and special tokens."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerBase:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        extra_special_tokens=[HEADER_START, HEADER_END, EOT],
        clean_up_tokenization_spaces=False,
        **kwargs,
    )
    return prepare_tokenizer(wrapped, "this tokenizer")
