"""Loss of checkpoints on text they were not trained on: of pieces of prose, or of responses.

`OMP_NUM_THREADS=1 python benchmarks/heldout_loss.py CHECKPOINT... --data FILE`: prose, from objects
with `text`; with `--phase post`, responses to prompts, from what `imprint train post` reads. Every
checkpoint is given the same examples, with its own tokenizer. One JSON object a checkpoint: the
mean over examples of an example's mean loss, in nats a token. Limit: whether the text was held out,
the caller knows.
"""

import argparse
import json
import random
import statistics
import sys
from pathlib import Path

import torch

from imprint.adapters.training.examples import Example, Examples, LongTexts, Pairs, find_files
from imprint.models import FastWeightModel, load_model, load_tokenizer

MAX_CHARS = 200_000_000


@torch.no_grad()
def loss_of(model: FastWeightModel, example: Example) -> float:
    """Nats a token: of the response after its document, or, without one, of the document."""
    tokens_T = torch.tensor([*example.document, *example.response])
    hidden_1TD, _ = model(tokens_T[:-1].unsqueeze(0))
    first = max(len(example.document), 1) if example.response else 1
    logprobs = model.token_logprobs(hidden_1TD[0, first - 1 :], tokens_T[first:])
    return -float(logprobs.mean())


def measure(arguments: argparse.Namespace, checkpoint: Path) -> dict[str, object]:
    """The numbers of one checkpoint."""
    tokenizer, files = load_tokenizer(checkpoint), find_files(arguments.data)
    source: Examples
    if arguments.phase == "post":
        source = Pairs(files, tokenizer, most_tokens=arguments.document_tokens)
    else:
        source = LongTexts(
            files, tokenizer, num_tokens=arguments.document_tokens, max_chars=MAX_CHARS
        )
    model = load_model(checkpoint)
    draws = (random.Random(f"{arguments.seed}:{i}") for i in range(arguments.num_examples))
    losses = [loss_of(model, source.draw(rng)) for rng in draws]
    return {
        "checkpoint": str(checkpoint),
        "examples": len(losses),
        "loss": round(statistics.fmean(losses), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="PATH")
    parser.add_argument("--phase", choices=("mid", "post"), default="mid")
    parser.add_argument("--document-tokens", type=int, default=1024, metavar="N")
    parser.add_argument("--num-examples", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    for checkpoint in arguments.checkpoints:
        sys.stdout.write(json.dumps(measure(arguments, checkpoint)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
