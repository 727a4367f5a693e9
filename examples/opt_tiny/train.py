"""Train `opt-tiny`, the model that comes with the package: stories of `corpus.py`, a byte-level BPE, opt_torch.

    python examples/opt_tiny/train.py --output build/opt-tiny

writes a directory that `from_pretrained` of every backend and of Hugging Face `transformers` takes. One seed decides
about stories, tokenizer, new weights and the order of training. The numbers are the same from run to run on one
machine with one number of threads and one release of PyTorch and opt_torch; elsewhere rounding leads to other weights.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import stories
from torch import Tensor, nn
from tqdm import tqdm

from opt_common import OPTTokenizer
from opt_torch import OPTConfig, OPTForCausalLM

PROMPTS = (
    "Once upon a time",
    "Anna was a brave girl who",
    "One rainy night, Oscar",
    "A shy fox named Luna had a green lantern",
    "It was almost the birthday of Ben",
)
"""Openings whose continuations are shown at the end."""

HELD_OUT_STORIES = 200
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
"""Ids 0 to 3, as in OPT's own vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the weights depend on.

    Attributes:
        stories: number of different stories.
        vocab_size: V of tokenizer and model.
        hidden_size: D.
        layers: L.
        heads: N; F is four times D.
        block: tokens in a row of a batch, and `max_position_embeddings`; no story of the grammar is longer.
        batch: rows in a batch.
        steps: number of updates.
        warmup: updates in which the learning rate rises to `peak`, before it falls to a twentieth along a cosine.
        peak: highest learning rate of AdamW.
        weight_decay: of the matrices; vectors have none.
        seed: of everything.
    """

    stories: int = 40_000
    vocab_size: int = 2048
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    block: int = 256
    batch: int = 16
    steps: int = 2200
    warmup: int = 100
    peak: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0

    def learning_rate(self, step: int) -> float:
        """The learning rate of update number `step`, from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def train_tokenizer(texts: Sequence[str], vocab_size: int, model_max_length: int) -> OPTTokenizer:
    """A byte-level BPE of the texts, set up as OPT's is: `</s>` in front, no space added, any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = bytelevel
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    # A second engine without the trainer's special tokens: of the four, OPT cuts only </s> and <pad> out of a text.
    engine = Tokenizer(models.BPE(vocab=learned["vocab"], merges=[tuple(merge) for merge in learned["merges"]]))
    engine.pre_tokenizer = bytelevel
    engine.decoder = decoders.ByteLevel()
    return OPTTokenizer(engine, model_max_length=model_max_length)


def encode(tokenizer: OPTTokenizer, texts: Sequence[str], block: int) -> tuple[np.ndarray, np.ndarray]:
    """One stream of ids, `</s>` in front of every story and so behind it too, and where the blocks may begin.

    A block is the stream from the start of a story on: a prompt, too, begins with `</s>` at position 0.

    Returns:
        The stream, and the starts of those stories that have a whole block behind them.
    """
    # A story at a time: as Python integers, the whole stream would take a gigabyte.
    rows = [np.array(tokenizer(text)["input_ids"]) for text in texts]
    stream = np.concatenate(rows)
    starts = np.cumsum([0, *(len(row) for row in rows)])
    return stream, starts[starts + block <= len(stream)]


def batches(stream: np.ndarray, starts: np.ndarray, recipe: Recipe) -> Iterator[Tensor]:
    """Endless batches (B, T) of blocks: every story once, in a new order, and again."""
    if len(starts) < recipe.batch:
        raise SystemExit(f"{recipe.stories} stories are too few for a batch of {recipe.batch}; use --stories.")
    generator = torch.Generator().manual_seed(recipe.seed)
    offsets = np.arange(recipe.block)
    while True:
        order = starts[torch.randperm(len(starts), generator=generator).numpy()]
        for first in range(0, len(order) - recipe.batch + 1, recipe.batch):
            yield torch.from_numpy(stream[order[first : first + recipe.batch, None] + offsets])


def new_model(recipe: Recipe) -> OPTForCausalLM:
    """A model with random weights, in training mode."""
    torch.manual_seed(recipe.seed)
    config = OPTConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        word_embed_proj_dim=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        ffn_dim=4 * recipe.hidden_size,
        max_position_embeddings=recipe.block,
        # There are more stories than the model can learn by heart.
        dropout=0.0,
        dtype="float32",
        extra={"architectures": ["OPTForCausalLM"]},
    )
    return OPTForCausalLM(config).train()


def train(model: OPTForCausalLM, recipe: Recipe, stream: np.ndarray, starts: np.ndarray) -> list[float]:
    """Train in place; return the loss of every step, in nats a token."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    losses: list[float] = []
    data = batches(stream, starts, recipe)
    with tqdm(range(recipe.steps), desc="training", unit="step", disable=None) as progress:
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step)
            ids_BT = next(data)
            loss = model(ids_BT, labels=ids_BT).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
            if progress.disable and (step + 1) % 250 == 0:
                print(f"step {step + 1}: loss {np.mean(losses[-100:]):.3f}", flush=True)
    return losses


@torch.inference_mode()
def held_out_loss(model: OPTForCausalLM, tokenizer: OPTTokenizer, texts: Sequence[str]) -> float:
    """Mean cross-entropy of whole stories, their closing `</s>` included, in nats a token."""
    model.eval()
    total, count = 0.0, 0
    for text in texts:
        ids_BT = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        total += model(ids_BT, labels=ids_BT).loss.item() * (ids_BT.shape[1] - 1)
        count += ids_BT.shape[1] - 1
    return total / count


@torch.inference_mode()
def continuation(model: OPTForCausalLM, tokenizer: OPTTokenizer, prompt: str) -> tuple[str, float, bool]:
    """The greedy story that a prompt begins; its smallest lead of the best logit over the second; whether it ends.

    The lead says how safe the text is from rounding: frameworks differ by some 1e-5.
    """
    model.eval()
    prompt_BT = torch.tensor([tokenizer(prompt)["input_ids"]])
    room = model.config.max_position_embeddings - prompt_BT.shape[1]
    ids_BT = model.generate(prompt_BT, max_new_tokens=room)
    best = model(ids_BT).logits[0, prompt_BT.shape[1] - 1 : -1].topk(2).values
    ended = ids_BT[0, -1].item() == tokenizer.eos_token_id
    return tokenizer.decode(ids_BT[0], skip_special_tokens=True), (best[:, 0] - best[:, 1]).min().item(), ended


def report(model: OPTForCausalLM, tokenizer: OPTTokenizer, recipe: Recipe) -> None:
    """Print what the model has learned: perplexity on unseen stories, and continuations."""
    unseen = list(stories(HELD_OUT_STORIES, seed=recipe.seed + 1))
    loss = held_out_loss(model, tokenizer, unseen)
    print(f"held-out loss {loss:.4f} nats a token, perplexity {math.exp(loss):.3f}\n")
    for prompt in PROMPTS:
        text, lead, ended = continuation(model, tokenizer, prompt)
        print(f"[smallest lead {lead:.3f}, {'ends with </s>' if ended else 'does not end'}] {text}\n")


def parse_arguments() -> tuple[Path, int, Recipe]:
    """The output directory, the number of threads and the recipe, from the command line."""
    parser = argparse.ArgumentParser(
        description="Train opt-tiny.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("build/opt-tiny"), help="new directory for the checkpoint")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    for field in dataclasses.fields(Recipe):
        kind: Any = field.type
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help="see Recipe")
    values = vars(parser.parse_args())
    output, threads = values.pop("output"), values.pop("threads")
    # Before the training, not after it.
    if output.exists() and any(output.iterdir()):
        parser.error(f"--output: {output} is not empty. Name another directory.")
    return output, threads, Recipe(**values)


def main() -> None:
    output, threads, recipe = parse_arguments()
    torch.set_num_threads(threads)
    texts = list(stories(recipe.stories, seed=recipe.seed))
    tokenizer = train_tokenizer(texts, recipe.vocab_size, recipe.block)
    stream, starts = encode(tokenizer, texts, recipe.block)
    model = new_model(recipe)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{len(texts):,} stories, {len(stream):,} tokens of {len(tokenizer):,} kinds; {size:,} parameters", flush=True
    )
    train(model, recipe, stream, starts)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"saved in {output}")
    report(model, tokenizer, recipe)


if __name__ == "__main__":
    main()
