"""Train the bundled tiny Llama on the Python standard library, export it, and measure it."""

import argparse
import copy
import json
import lzma
import math
import random
import sysconfig
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import END, HELDOUT, TURN_END, TURN_START, chat_documents, read_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "checkpoint"
WORK = HERE / ".train"

SPECIALS = [END, TURN_START, TURN_END]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT_SHARE = 0.15
# The library's tests join late, as text not seen before instead of a third pass over the library;
# whether that helps was not measured.
TEST_SHARE, TESTS_FROM = 0.4, 0.6
# Most steps use the short window, which is faster; the long one at the end teaches the positions
# up to max_position_embeddings.
SHORT_WINDOW, LONG_WINDOW, LONG_FROM = 512, 1024, 0.8


# --- tokenizer and model ----------------------------------------------------------------------


def train_tokenizer(corpus: dict[str, str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of the corpus; the special tokens take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.values(), trainer)
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary must have."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return found


def model_config(args: argparse.Namespace, tokenizer: Tokenizer) -> LlamaConfig:
    """The architecture: a small Llama with grouped-query attention and tied embeddings."""
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        max_position_embeddings=LONG_WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=token_id(tokenizer, END),
        eos_token_id=token_id(tokenizer, END),
        pad_token_id=None,
        use_cache=True,
    )


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a standard Hugging Face directory with bfloat16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    # Saving writes the dtype into the config, which must not reach the model in training.
    small = LlamaForCausalLM(copy.deepcopy(model.config))
    small.load_state_dict(model.state_dict())
    small.bfloat16()
    ends = [token_id(tokenizer, END), token_id(tokenizer, TURN_END)]
    small.generation_config = GenerationConfig(
        bos_token_id=ends[0], eos_token_id=ends, pad_token_id=ends[0]
    )
    small.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        extra_special_tokens=[TURN_START, TURN_END],
        model_max_length=LONG_WINDOW,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


# --- training ---------------------------------------------------------------------------------


class Stream:
    """Endless windows in random order over shuffled documents, each after <|endoftext|>."""

    def __init__(self, documents: list[np.ndarray], end: int, seed: int) -> None:
        self.documents = documents
        self.end = end
        self.random = random.Random(seed)
        self.text = np.zeros(0, dtype=np.int64)
        self.starts: list[int] = []
        self.length = 0
        self.epochs = 0

    def refill(self, length: int) -> None:
        """Begin one more pass over all documents, in new order and cut at new places."""
        order = list(range(len(self.documents)))
        self.random.shuffle(order)
        pieces = [np.array([self.end])]
        for index in order:
            pieces += [self.documents[index], np.array([self.end])]
        self.text = np.concatenate(pieces)
        # Windows of one file are much alike: a batch of neighbours would be a noisy one.
        self.starts = list(range(self.random.randrange(length), len(self.text) - length, length))
        self.random.shuffle(self.starts)
        self.length = length
        self.epochs += 1

    def take(self, rows: int, length: int) -> np.ndarray:
        """The next rows of length tokens, and one more each to predict."""
        windows = []
        for _ in range(rows):
            if not self.starts or self.length != length:
                self.refill(length)
            start = self.starts.pop()
            windows.append(self.text[start : start + length + 1])
        return np.stack(windows)


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text."""
    return [np.array(e.ids, dtype=np.int64) for e in tokenizer.encode_batch_fast(texts)]


class Trainer:
    """The model, its optimizer, its two streams, and where in the schedule it stands."""

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer) -> None:
        self.args = args
        self.tokenizer = tokenizer
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        with self.device:
            self.model = LlamaForCausalLM(model_config(args, tokenizer))
        self.forward = torch.compile(self.model, dynamic=False) if args.compile else self.model
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        scales = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": scales, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), fused=True)
        self.step = 0
        self.tokens = 0
        self.spent = 0.0

    def load_data(self, library: dict[str, str], tests: dict[str, str]) -> None:
        """Tokenize the sources and the conversations."""
        end = token_id(self.tokenizer, END)
        texts = {
            "files": list(library.values()),
            "conversations": chat_documents(library, self.args.seed),
            "tests": list(tests.values()),
        }
        self.streams = []
        for index, (name, part) in enumerate(texts.items()):
            ids = encode_all(self.tokenizer, part)
            self.streams.append(Stream(ids, end, self.args.seed + index))
            print(f"{len(ids)} {name}, {sum(map(len, ids)) / 1e6:.2f} M tokens")

    @property
    def progress(self) -> float:
        """The share of the budget used: of the steps if given, else of the minutes."""
        steps, seconds = int(self.args.steps), 60 * float(self.args.minutes)
        return min(1.0, self.step / steps if steps else self.spent / seconds)

    def rate(self) -> float:
        """The learning rate: linear warm-up, then a cosine down to a fiftieth."""
        warmup: int = self.args.warmup
        warm = min(1.0, (self.step + 1) / warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
        peak: float = self.args.rate
        return peak * warm * (0.02 + 0.98 * cosine)

    def batch(self) -> torch.Tensor:
        """The next batch: mostly files, with fixed shares of rows of conversations and tests."""
        length = SHORT_WINDOW if self.progress < LONG_FROM else LONG_WINDOW
        rows = max(3, self.args.batch_tokens // length)

        def part(share: float) -> int:
            # The fraction is spread over steps, since a batch has only a few rows.
            return int((self.step + 1) * rows * share) - int(self.step * rows * share)

        chat = part(CHAT_SHARE)
        tests = part(TEST_SHARE) if self.progress >= TESTS_FROM else 0
        counts = (rows - chat - tests, chat, tests)
        taken = [
            stream.take(count, length)
            for stream, count in zip(self.streams, counts, strict=True)
            if count
        ]
        return torch.from_numpy(np.concatenate(taken)).to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Bfloat16 arithmetic where it was asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bfloat16)

    def update(self) -> float:
        """One optimizer step; the loss in nats per token."""
        began = time.monotonic()
        batch = self.batch()
        with self.autocast():
            logits = self.forward(input_ids=batch[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch[:, 1:].flatten()
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        self.step += 1
        self.tokens += batch.shape[0] * (batch.shape[1] - 1)
        self.spent += time.monotonic() - began
        return value

    def save(self, path: Path) -> None:
        """Write everything that a resumed run needs, replacing the last state in one move."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counters": (self.step, self.tokens, self.spent),
            "streams": [
                (s.text, s.starts, s.length, s.epochs, s.random.getstate()) for s in self.streams
            ],
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, path: Path) -> None:
        """Continue from a saved state."""
        # The file is this script's own and holds plain Python objects beside tensors.
        state = torch.load(path, map_location=self.device, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens, self.spent = state["counters"]
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.text, stream.starts, stream.length, stream.epochs, random_state = saved
            stream.random.setstate(random_state)

    def report(self, losses: list[float], window: Callable[[], float]) -> None:
        """Print one progress line."""
        left = (1 - self.progress) * self.spent / max(self.progress, 1e-9)
        print(
            f"step {self.step}  loss {sum(losses) / len(losses):.3f}  rate {self.rate():.2e}  "
            f"{window():.0f} tokens/s  {self.tokens / 1e6:.2f} M tokens  "
            f"epoch {self.streams[0].epochs}  {self.spent / 60:.1f} min, {left / 60:.1f} left",
            flush=True,
        )

    def run(self, state: Path, folder: Path) -> None:
        """Train until the budget is used, saving and exporting on the way."""
        losses: list[float] = []
        mark = [self.tokens, self.spent, self.spent, self.spent]

        def speed() -> float:
            return (self.tokens - mark[0]) / max(self.spent - mark[1], 1e-9)

        while self.progress < 1.0:
            losses.append(self.update())
            if len(losses) == self.args.report_every:
                self.report(losses, speed)
                losses, mark[0], mark[1] = [], self.tokens, self.spent
            if self.spent - mark[2] > 60:
                self.save(state)
                mark[2] = self.spent
            if self.spent - mark[3] > 60 * self.args.export_every:
                export(self.model, self.tokenizer, folder)
                mark[3] = self.spent
        self.save(state)
        export(self.model, self.tokenizer, folder)
        print(f"{self.step} steps, {self.tokens} tokens, {self.spent / 60:.1f} min -> {folder}")


# --- evaluation -------------------------------------------------------------------------------


def heldout_bits(model: Any, ids: list[int], start: int, window: int, stride: int) -> float:
    """Bits the model needs for all ids, each predicted once, from at least window - stride ids.

    The first id is predicted from the start token alone, so that every byte is counted.
    """
    sequence = torch.tensor([start, *ids])
    total, done = 0.0, 0
    with torch.inference_mode():
        while done < len(ids):
            # Position k of the sequence predicts ids[k]; the first window scores all of its own.
            stop = min(len(ids), window if done == 0 else done + stride)
            first = max(0, stop - window)
            logits = model(input_ids=sequence[None, first:stop], use_cache=False).logits[0]
            scores = torch.log_softmax(logits.float()[done - first :], dim=-1)
            wanted = sequence[done + 1 : stop + 1]
            total -= scores.gather(1, wanted[:, None]).double().sum().item()
            done = stop
    return total / math.log(2)


def evaluate(folder: Path, heldout: Path, stride: int = LONG_WINDOW // 2) -> dict[str, float]:
    """Bits per byte of the held-out file: by the exported model, and by xz -9."""
    text = heldout.read_text(encoding="utf-8")
    data = text.encode()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    window = model.config.max_position_embeddings
    bits = heldout_bits(model, ids, tokenizer.eos_token_id, window, stride)
    return {
        "bytes": len(data),
        "tokens": len(ids),
        "parameters": sum(p.numel() for p in model.parameters()),
        "model_bits_per_byte": bits / len(data),
        "xz_bits_per_byte": 8 * len(lzma.compress(data, preset=9)) / len(data),
    }


def print_samples(folder: Path, seed: int) -> None:
    """Print a few continuations and an answer, greedy and at temperature 0.7."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    question = [{"role": "user", "content": "Write the function read_lines."}]
    chat = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    # A prompt ends before the line break, since a break and the indentation after it are one token.
    for prompt in ("def fibonacci(n):", "class Stack:", END + "import os", chat):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        for sampled in (False, True):
            torch.manual_seed(seed)
            choice = {"temperature": 0.7} if sampled else {}
            out = model.generate(ids, max_new_tokens=160, do_sample=sampled, **choice)
            print(f"--- {'temperature 0.7' if sampled else 'greedy'}\n{tokenizer.decode(out[0])}")


# --- command line -----------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    default_stdlib = Path(sysconfig.get_paths()["stdlib"])
    add("--evaluate", action="store_true", help="only print bits per byte of the held-out file")
    add("--sample", action="store_true", help="only print a few samples")
    add("--stdlib", type=Path, default=default_stdlib, help="the standard library's sources")
    add("--out", type=Path, default=CHECKPOINT, help="the Hugging Face directory")
    add("--work", type=Path, default=WORK, help="where the resumable state is kept")
    add("--resume", action="store_true", help="continue from the saved state")
    add("--minutes", type=float, default=57, help="budget in minutes of training")
    add("--steps", type=int, default=0, help="budget in steps, instead (repeatable exactly)")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--device", default="cpu", help="cpu or cuda")
    add("--seed", type=int, default=0, help="seed of weights, order and samples")
    add("--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="autocast")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    add("--vocabulary", type=int, default=4096, help="BPE vocabulary size")
    add("--hidden", type=int, default=256, help="hidden size")
    add("--intermediate", type=int, default=512, help="MLP width")
    add("--layers", type=int, default=6, help="layers")
    add("--heads", type=int, default=8, help="query heads")
    add("--kv-heads", type=int, default=2, help="key and value heads")
    add("--batch-tokens", type=int, default=4096, help="tokens per step")
    add("--rate", type=float, default=2e-3, help="peak learning rate")
    add("--warmup", type=int, default=100, help="warm-up steps")
    add("--report-every", type=int, default=20, help="steps per progress line")
    add("--export-every", type=float, default=10, help="minutes between exports on the way")
    return parser.parse_args()


def load_tokenizer(args: argparse.Namespace, corpus: dict[str, str]) -> Tokenizer:
    """The tokenizer: the work folder's on resume, else trained anew."""
    path = args.work / "tokenizer.json"
    if args.resume:
        return Tokenizer.from_file(str(path))
    tokenizer = train_tokenizer(corpus, args.vocabulary)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def main() -> None:
    """Train, or evaluate or sample what was trained."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        print(json.dumps(evaluate(args.out, HELDOUT), indent=2))
    if args.sample:
        print_samples(args.out, args.seed)
    if args.evaluate or args.sample:
        return
    library, tests = read_corpus(args.stdlib)
    trainer = Trainer(args, load_tokenizer(args, library))
    trainer.load_data(library, tests)
    state = args.work / "state.pt"
    if args.resume:
        trainer.restore(state)
    trainer.run(state, args.out)


if __name__ == "__main__":
    main()
