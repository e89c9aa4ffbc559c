"""A long text is read once; its cache goes over HTTP to whoever asks about it next, at the level that the network allows.

    python examples/stream_context.py                    # a server in this process, throttled to 200 kB/s
    python examples/stream_context.py --rate 40 --deadline 2 --spec K4V4
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from tersor.kv import ContextServer, publish, stream_context

MODEL = Path(__file__).parent / "models" / "stdlib-llama"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--text", default=str(MODEL / "heldout.txt"))
    parser.add_argument("--tokens", type=int, default=448, help="of the text that make the context")
    parser.add_argument("--spec", default="K8V8", help="of the cache that the context is loaded into")
    parser.add_argument("--rate", type=float, default=200, help="kB/s that the server gives")
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds in which the context shall be there")
    args = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Path(args.text).read_text()[: 20 * args.tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.tokens]
    if ids.shape[1] < 2:
        parser.error(f"text: found {ids.shape[1]} tokens, accepted are 2 or more")
    context = ids[:, :-1]

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(context, past_key_values=cache, logits_to_keep=1)
    with tempfile.TemporaryDirectory() as directory:
        manifest = publish(cache, Path(directory) / "text", model, token_ids=context, chunk_tokens=64)
        for index, level in enumerate(manifest.levels):
            print(f"level {level.name}: {manifest.nbytes(index) / 1000:.1f} kB, {manifest.bits(index):.2f} bits a number")
        with ContextServer(directory, bytes_per_second=args.rate * 1000) as server:
            loaded = stream_context(f"{server.url}/text", model, args.spec, deadline=args.deadline)
    for chunk in loaded.chunks:
        print(f"chunk {chunk.chunk}: {chunk.level}, {chunk.nbytes} bytes in {chunk.seconds:.3f} s")
    print(f"{context.shape[1]} tokens in {loaded.seconds:.2f} s")
    found = model.generate(ids, past_key_values=loaded.cache, max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(found[0, ids.shape[1]:]))


if __name__ == "__main__":
    main()
