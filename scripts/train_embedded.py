"""Trains the embedded model and writes it to embedded/model as a Hugging Face checkpoint.

    OMP_WAIT_POLICY=passive nice -n 19 python scripts/train_embedded.py --minutes 54

On a machine with other work a thread that spins while it waits takes the core from the one it waits for:
hence `passive`. The learning rate follows the budget (wall-clock, or optimizer steps for a run that can be
repeated exactly), so any budget ends with a finished decay. Progress is kept in --work-dir; the same command
goes on from there."""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from embedded_corpus import CorpusEntry, collect_documents, conversation, questions_and_answers
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

MODEL_DIR = Path(__file__).parents[1] / "embedded" / "model"
SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END_OF_TEXT, END_OF_TURN = 0, 4
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] not in ('system', 'user', 'assistant') -%}{{-"
    " raise_exception('role ' ~ message['role'] ~ ' is not supported; supported are system, user and"
    " assistant') -}}{%- endif -%}{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}{%-"
    " endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
CONFIG = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=[END_OF_TEXT, END_OF_TURN],
    pad_token_id=END_OF_TEXT,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)
TOKENS_PER_STEP = 4096
LONG_EVERY = 8  # every n-th step trains on rows of the full context, the others on rows of ROW_LEN
ROW_LEN = 512
GROUP_TOKENS = 2048  # documents of one module stay together up to this many tokens
WARMUP = 0.02  # fraction of the budget
DECAY = 0.4
CHECKPOINT_S = 120.0


@dataclass
class Progress:
    step: int = 0
    trained_s: float = 0.0


def make_tokenizer(documents: list[CorpusEntry]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text becomes tokens and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.render() for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[END_OF_TEXT],
        pad_token=SPECIAL_TOKENS[END_OF_TEXT],
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONFIG.max_position_embeddings,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }  # the name every version knows
    path.write_text(json.dumps(config, indent=2) + "\n")


class Corpus:
    """Token rows without end: every epoch sees each document and asks each question, in a new order and
    wording."""

    def __init__(self, documents: list[CorpusEntry], tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        # private names concern the implementation: left out
        documents = [document for document in documents if document.is_public and not document.is_held_out]
        self.groups: dict[str, list[CorpusEntry]] = {}
        for document in documents:
            self.groups.setdefault(document.group, []).append(document)
        self.questions = questions_and_answers(documents)
        self.left: list[int] = []
        self.epoch = 0

    def batch(self, step: int) -> torch.Tensor:  # [rows, row_len]
        row_len = CONFIG.max_position_embeddings if step % LONG_EVERY == LONG_EVERY - 1 else ROW_LEN
        while len(self.left) < TOKENS_PER_STEP:
            self.left += self._epoch_tokens()
            self.epoch += 1
        taken, self.left = self.left[:TOKENS_PER_STEP], self.left[TOKENS_PER_STEP:]
        return torch.tensor(taken).view(-1, row_len)

    def _epoch_tokens(self) -> list[int]:
        rng = random.Random(self.epoch)
        pieces = [*self._document_pieces(rng), *self._chat_pieces(rng)]
        rng.shuffle(pieces)
        return [token for piece in pieces for token in piece]

    def _document_pieces(self, rng: random.Random) -> Iterator[list[int]]:
        for documents in self.groups.values():
            piece: list[int] = []
            for tokens in self._encode([document.render(rng.random() < 0.6) for document in documents]):
                if piece and len(piece) + len(tokens) > GROUP_TOKENS:
                    yield piece
                    piece = []
                piece += [*tokens, END_OF_TEXT]
            yield piece

    def _chat_pieces(self, rng: random.Random) -> Iterator[list[int]]:
        questions = [
            (phrasings, answer)
            for phrasings, answer, times in self.questions
            for _ in range(int(times) + (rng.random() < times % 1))
        ]
        rng.shuffle(questions)
        chats: list[str] = []
        while questions:
            turns = [questions.pop() for _ in range(min(len(questions), rng.choice((1, 1, 1, 2, 3))))]
            chats.append(self.tokenizer.apply_chat_template(conversation(rng, turns), tokenize=False))
        return ([*tokens, END_OF_TEXT] for tokens in self._encode(chats))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self.tokenizer(texts)["input_ids"]
        return encoded


def held_out_perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[CorpusEntry]
) -> float:
    """Per token, each held-out document on its own with its heading and its end."""
    loss, count = 0.0, 0
    for document in documents:
        if document.is_held_out:
            ids = torch.tensor([[*tokenizer(document.render())["input_ids"], END_OF_TEXT]])[
                :, : CONFIG.max_position_embeddings
            ]
            with torch.inference_mode():
                loss += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return math.exp(loss / count)


def rate(done: float) -> float:
    """The fraction of the peak learning rate after this fraction of the budget: warm-up, plateau, linear
    decay to zero."""
    return max(0.0, min(1.0, done / WARMUP, (1.0 - done) / DECAY))


def make_optimizers(model: LlamaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between embedding and head, AdamW for the rest."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named.items() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=peak, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def train(model: LlamaForCausalLM, corpus: Corpus, args: argparse.Namespace) -> None:
    optimizers = make_optimizers(model, args.peak)
    checkpoint = args.work_dir / "checkpoint.pt"
    progress = Progress()
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        progress = Progress(**state["progress"])
        for step in range(progress.step):  # the same data order goes on
            corpus.batch(step)
    saved_s, started_s = time.monotonic(), time.monotonic() - progress.trained_s
    while True:
        done = progress.step / args.steps if args.steps else progress.trained_s / (60 * args.minutes)
        if done >= 1:
            break
        loss = train_step(model, optimizers, corpus.batch(progress.step), args.peak * rate(done))
        progress = Progress(progress.step + 1, time.monotonic() - started_s)
        if progress.step % 20 == 0:
            print(
                f"step {progress.step} epoch {corpus.epoch} {progress.trained_s:.0f} s loss {loss:.3f}",
                flush=True,
            )
        if time.monotonic() - saved_s > CHECKPOINT_S:
            save_checkpoint(checkpoint, model, optimizers, progress)
            saved_s = time.monotonic()


def save_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], progress: Progress
) -> None:
    optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save(
        {"model": model.state_dict(), "optimizers": optimizer_states, "progress": vars(progress)},
        path.with_suffix(".new"),
    )
    os.replace(path.with_suffix(".new"), path)


def train_step(
    model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], ids: torch.Tensor, lr: float
) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """The weights as bf16, put in place in one move: readers see the old file or the new one."""
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors.new", metadata={"format": "pt"})
    (folder / "model.safetensors.new").chmod(0o644)
    os.replace(folder / "model.safetensors.new", folder / "model.safetensors")
    config = CONFIG.to_diff_dict() | {"dtype": "bfloat16", "rope_parameters": CONFIG.rope_parameters}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    GenerationConfig(
        eos_token_id=CONFIG.eos_token_id,
        pad_token_id=END_OF_TEXT,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        max_new_tokens=256,
    ).save_pretrained(folder)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=54.0, help="wall-clock budget of training")
    parser.add_argument("--steps", type=int, help="budget in optimizer steps instead, for a repeatable run")
    parser.add_argument("--peak", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--work-dir", type=Path, default=Path("build/embedded"), help="where progress is kept"
    )
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    documents = collect_documents()
    if not (args.out / "tokenizer.json").exists():
        save_tokenizer(
            make_tokenizer([document for document in documents if not document.is_held_out]), args.out
        )
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = LlamaForCausalLM(CONFIG)
    train(model.train(), Corpus(documents, tokenizer), args)
    print(f"held-out perplexity {held_out_perplexity(model.eval(), tokenizer, documents):.2f}")
    export(model, args.out)


if __name__ == "__main__":
    main()
