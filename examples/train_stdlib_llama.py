"""Train a small Llama-architecture language model on the source of Python's own standard library.

    python examples/train_stdlib_llama.py OUT                       # the model of examples/models/stdlib-llama
    python examples/train_stdlib_llama.py OUT --minutes 2 --layers 2 --hidden 128 --heads 2 --kv-heads 1 --ffn 384

Nothing is downloaded: the text is that of the interpreter that runs this script (`tersor.calibration_text`). Every
20th file is held out, and the first 400,000 characters of those are written to OUT/heldout.txt. OUT gets the model in
bf16, its tokenizer, the held-out text and TRAINING.json with the settings and the final held-out perplexity.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tersor.calibration_text import HELD_OUT_CHARACTERS, read, split_standard_library
from tersor.evaluate import perplexity, windows

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    for name, value in dict(hidden=256, layers=8, heads=4, kv_heads=2, ffn=768, vocab=4096, length=256, batch=16,
                            seed=0).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--minutes", type=float, default=32.0, help="wall time of the training loop")
    parser.add_argument("--untied", action="store_true", help="an output matrix apart from the embeddings")
    return parser.parse_args()


def train_tokenizer(files: list[Path], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[BOS, EOS, PAD], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(map(read, files), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.ffn, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, head_dim=args.hidden // args.heads,
        max_position_embeddings=2048, tie_word_embeddings=not args.untied, rope_theta=10000.0, bos_token_id=0,
        eos_token_id=1, pad_token_id=2))


def train(model: LlamaForCausalLM, ids: torch.Tensor, args: argparse.Namespace) -> tuple[int, int]:
    """Steps and tokens of AdamW with a cosine schedule over wall time, in bf16 autocast with fp32 weights."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    started, budget, step, tokens = time.monotonic(), 60 * args.minutes, 0, 0
    model.train()
    while (elapsed := time.monotonic() - started) < budget:
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * elapsed / budget))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, step / 100) * decay
        starts = torch.randint(0, len(ids) - args.length - 1, (args.batch,))
        batch = torch.stack([ids[start : start + args.length] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + batch.numel()
        if step % 100 == 0:
            print(f"step {step}  {tokens / 1e6:.2f} M tokens  {tokens / elapsed:.0f} tokens/s  "
                  f"loss {loss.item():.3f}", flush=True)
    return step, tokens


def main() -> None:
    args = arguments()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    files, held_out = split_standard_library()
    held_text = "\n".join(map(read, held_out))[:HELD_OUT_CHARACTERS]
    (args.out / "heldout.txt").write_text(held_text, encoding="utf-8")
    tokenizer = train_tokenizer(files, args.vocab)
    tokenizer.save_pretrained(args.out)

    random.shuffle(files)
    backend = tokenizer.backend_tokenizer
    ids = torch.tensor([token for file in files for token in (0, *backend.encode(read(file)).ids, 1)])
    model = build_model(args)
    print(f"{len(files)} files, {len(ids)} training tokens, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", flush=True)

    steps, tokens = train(model, ids, args)
    model.eval()
    held_ids = torch.tensor(backend.encode(held_text).ids)
    final = perplexity(model, windows(held_ids, 512, limit=100))
    print(f"held-out perplexity {final:.2f}")
    model.to(torch.bfloat16).save_pretrained(args.out)
    record = dict(args={key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
                  tokens=tokens, steps=steps, heldout_ppl_512=final, torch=torch.__version__)
    (args.out / "TRAINING.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
