"""Make the base model of the demo: a tokenizer and a small pre-trained Llama.

Enters: a seed and a step count; the word lists and prompts of make_demo_data.py.
Leaves: <out>/ as a Hugging Face model folder (config, safetensors weights, tokenizer.model, tokenizer.json,
chat_template.jinja).
The corpus is drawn on the fly and has three parts: bare sums ("23 + 14 = 37."), some after the same sum said in words
("Add 23 and 14."); statements about people and objects ("Mia has 17 marbles. Leo buys 5 pens."); and reading questions
about such statements ("Who has 17 marbles?"), whose answer stands in the passage.
A story whose answer is to be worked out is never part of it: that is what fine-tuning is to teach.

Remake (about half an hour on one core): python tools/make_demo_model.py --seed 0 --steps 6000 --out launch/demo/model
"""

import argparse
import io
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from make_demo_data import HOLDERS, LARGEST, LARGEST_FACTOR, NAMES, OBJECTS, SMALLEST, compute, make_problem
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
VOCAB_SIZE = 512
ROW_LENGTH, ROWS = 128, 16
PEAK_RATE, WARMUP = 3e-3, 100
# Chats are written as the task is: a line that asks, then the answer and the end token.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}"
)

VERBS = (
    ("has", "have"),
    ("needs", "need"),
    ("buys", "buy"),
    ("sells", "sell"),
    ("finds", "find"),
    ("loses", "lose"),
    ("takes", "take"),
    ("wants", "want"),
)


def verb_fact(verb: str, bare: str, before: str, after: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The statement that someone does `verb`; `before` and `after` are other verbs to tell it from."""
    return f"{{n}} {verb} {{a}} {{o}}.", (
        (f"Who {verb} {{a}} {{o}}?", "{n}"),
        (f"How many {{o}} does {{n}} {bare}?", "{a}"),
        (f"What does {{n}} {bare}?", "{a} {o}"),
        (f"Does {{n}} {before} or {bare} {{a}} {{o}}?", bare),
        (f"Does {{n}} {bare} or {after} {{a}} {{o}}?", bare),
    )


# Statements, each with the questions that it answers.
VERB_FACTS = tuple(verb_fact(*VERBS[i], VERBS[i - 1][1], VERBS[(i + 1) % len(VERBS)][1]) for i in range(len(VERBS)))
OTHER_FACTS = (
    (
        "{n} gives {a} {o} to {m}.",
        (
            ("Who gives {o} to {m}?", "{n}"),
            ("How many {o} does {n} give to {m}?", "{a}"),
        ),
    ),
    (
        "{m} gives {n} {a} more {o}.",
        (
            ("Who gives {n} more {o}?", "{m}"),
            ("How many more {o} does {m} give {n}?", "{a}"),
        ),
    ),
    (
        "There are {a} {o} in a {box}.",
        (
            ("How many {o} are in the {box}?", "{a}"),
            ("What is in the {box}?", "{a} {o}"),
        ),
    ),
    ("There are {a} {boxes}.", (("How many {boxes} are there?", "{a}"),)),
    ("Each {box} holds {a} {o}.", (("How many {o} does each {box} hold?", "{a}"),)),
    (
        "{n} has {boxes} with {a} {o} in each {box}.",
        (
            ("How many {o} are in each {box}?", "{a}"),
            ("Who has {boxes} with {o}?", "{n}"),
        ),
    ),
    ("{n} then has {a} {o} left.", (("How many {o} does {n} have left?", "{a}"),)),
    ("{n} now has {a} {o}.", (("How many {o} does {n} have now?", "{a}"),)),
    ("{n} and {m} have {a} {o} together.", (("How many {o} do {n} and {m} have together?", "{a}"),)),
    ("In total {n} buys {a} {o}.", (("How many {o} does {n} buy in total?", "{a}"),)),
    ("{n} has more {o} than {m}.", (("Who has more {o} than {m}?", "{n}"),)),
    ("{n} later buys {o} for {a} days.", (("For how many days does {n} buy {o}?", "{a}"),)),
    ("There is a second {box} and {n} takes {o} a day.", (("Who takes {o} a day?", "{n}"),)),
)


# Sums said in words, without a story; the second sum of a line starts from the result of the first.
COMMANDS = {
    "+": ("Add {a} and {b}", "What is {a} plus {b}"),
    "-": ("Subtract {b} from {a}", "What is {a} minus {b}"),
    "*": ("Multiply {a} by {b}", "What is {a} times {b}"),
}
NEXT_COMMANDS = {"+": " and then add {c}", "-": " and then subtract {c}", "*": " and then multiply by {c}"}


def draw_sum(rng: random.Random, left: int | None = None) -> tuple[int, str, int]:
    """A sum such as (23, "+", 14); `left` fixes its first term."""
    while True:
        sign = rng.choice("+-*") if left is None or left <= LARGEST_FACTOR else rng.choice("+-")
        top = LARGEST_FACTOR if sign == "*" else LARGEST
        a = left if left is not None else rng.randint(SMALLEST, top)
        b = rng.randint(SMALLEST, top)
        if SMALLEST <= compute(a, sign, b) <= LARGEST:
            return a, sign, b


def write_sum(a: int, sign: str, b: int) -> str:
    return f"{a} {sign} {b} = {compute(a, sign, b)}."


def draw_drills(rng: random.Random) -> str:
    """Lines of one sum, or of two where the second starts from the result of the first.

    In half of the drills every line follows the same sums said in words.
    """
    lines, spoken = [], rng.random() < 0.5
    for _ in range(rng.randint(3, 6)):
        a, sign, b = draw_sum(rng)
        line, command, result = write_sum(a, sign, b), rng.choice(COMMANDS[sign]), compute(a, sign, b)
        # A second sum exists only where its own result can be in range too.
        if rng.random() < 0.4 and SMALLEST * 2 <= result <= LARGEST - SMALLEST:
            _, next_sign, c = draw_sum(rng, left=result)
            line += " " + write_sum(result, next_sign, c)
            command += NEXT_COMMANDS[next_sign].format(c=c)
        if spoken:
            lines.append(command.format(a=a, b=b) + ("?" if command.startswith("What") else "."))
        lines.append(line)
    return "\n".join(lines)


def draw_reading(rng: random.Random) -> str:
    """A passage of one to four statements and questions about it, each answered on the line after it.

    Either one person does different things or each statement has its own people, so every question has one answer.
    """
    count = rng.randint(1, 4)
    names, holders = rng.sample(NAMES, 2 * count), rng.sample(HOLDERS, count)
    numbers, objects = rng.sample(range(SMALLEST, LARGEST + 1), count), rng.choices(OBJECTS, k=2)
    facts = rng.sample(VERB_FACTS, count)
    if rng.random() < 0.4:
        names[:count] = [names[0]] * count
    else:
        facts = [rng.choice((fact, rng.choice(OTHER_FACTS))) for fact in facts]
    statements, questions = [], []
    for i, (statement, asked) in enumerate(facts):
        slots = {
            "n": names[i],
            "m": names[-1 - i],
            "a": numbers[i],
            "o": rng.choice(objects),
            "boxes": holders[i][0],
            "box": holders[i][1],
        }
        statements.append(statement.format(**slots))
        questions += [(q.format(**slots), a.format(**slots)) for q, a in asked]
    rng.shuffle(questions)
    opening = rng.choice(("", "The answer is "))
    return " ".join(statements) + " " + "\n".join(f"{q}\n{opening}{a}." for q, a in questions[:4])


def draw_document(rng: random.Random) -> str:
    return draw_drills(rng) if rng.random() < 0.5 else draw_reading(rng)


def make_tokenizer(seed: int, out: Path) -> PreTrainedTokenizerFast:
    """Train a SentencePiece BPE model and store it both as it is and as a fast Hugging Face tokenizer.

    The prompts of the task are shown too (not their answers), so that their words become whole pieces.
    """
    rng, model = random.Random(seed), io.BytesIO()
    texts = [draw_document(rng) for _ in range(4000)] + [make_problem(rng)["prompt"] for _ in range(4000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        split_digits=True,
        character_coverage=1.0,
        byte_fallback=True,
        user_defined_symbols=["\n"],
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        pad_piece="<pad>",
        minloglevel=1,
        # Text is kept as it is, so that decoding gives it back and a prompt and its completion can be encoded apart.
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )
    (out / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    # SentencePiece numbers its merged pieces in the order of merging, so the order of ids ranks the merges.
    words = [piece for piece, i in vocab.items() if not (pieces.is_control(i) or pieces.is_byte(i))]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in words
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    fast = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", "\u2581")
    fast.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, model_max_length=256, clean_up_tokenization_spaces=False, **SPECIAL
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    for text in texts[::40]:
        ids = tokenizer.encode(text)
        assert ids == [tokenizer.bos_token_id, *pieces.encode(text)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, text
    return tokenizer


def draw_rows(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[torch.Tensor]:
    """Batches of rows; each row begins with a new document and is filled with further ones."""
    while True:
        rows = []
        for _ in range(ROWS):
            row: list[int] = []
            while len(row) < ROW_LENGTH:
                row += [*tokenizer.encode(draw_document(rng)), tokenizer.eos_token_id]
            rows.append(row[:ROW_LENGTH])
        yield torch.tensor(rows)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: LlamaForCausalLM, batches: Iterator[torch.Tensor], steps: int) -> None:
    """Next-token training with a linear warm-up and a cosine decay to zero.

    Muon takes the matrices of the layers: in a trial of 1000 steps on an earlier corpus it had 98 % of the sums right,
    AdamW alone 62 %.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [
        *model.model.embed_tokens.parameters(),
        *model.lm_head.parameters(),
        *(p for p in model.model.parameters() if p.ndim == 1),
    ]
    optimizers = [
        torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: min((i + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * i / steps)))
        for o in optimizers
    ]
    start, total = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        total += loss.item()
        if step % 250 == 0:
            print(f"step {step}  loss {total / 250:.4f}  {time.monotonic() - start:.0f} s", flush=True)
            total = 0.0


@torch.no_grad()
def exact_share(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> float:
    """The share of texts whose second part is the model's greedy continuation of the first."""
    right = 0
    for given, expected in pairs:
        prefix, answer = tokenizer.encode(given), tokenizer.encode(expected, add_special_tokens=False)
        predicted = model(input_ids=torch.tensor([prefix + answer])).logits[0, len(prefix) - 1 : -1].argmax(-1)
        right += predicted.tolist() == answer
    return right / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--out", type=Path, default=Path("launch/demo/model"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # the order of summation, hence the weights, would depend on the thread count
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.seed, args.out)
    model = make_model(tokenizer)
    print(f"{len(tokenizer)} pieces, {model.num_parameters()} parameters")
    train(model, draw_rows(tokenizer, random.Random(args.seed + 1)), args.steps)
    model.eval().save_pretrained(args.out)

    rng = random.Random(args.seed + 2)
    sums = [write_sum(*draw_sum(rng)).partition("=") for _ in range(500)]
    # Only after a first question is it known whether an answer opens with "The answer is".
    readings = [t.rpartition("\n") for t in (draw_reading(rng) for _ in range(500)) if t.count("\n") > 1]
    for name, texts in (("sums", sums), ("reading questions", readings)):
        print(name, "right:", exact_share(model, tokenizer, [(given + mark, answer) for given, mark, answer in texts]))


if __name__ == "__main__":
    main()
