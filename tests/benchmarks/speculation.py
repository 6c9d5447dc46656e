"""One user's answers with guesses and without: two rings, asked the same in turns.

    python -m tests.benchmarks.speculation [--prompts demo|random|repeats] [--stages 3] [--wait-ms 0]

demo: text that the demo model was not trained on; repeats: such text, and its first half again; random:
tokens drawn one by one, answered at temperature 1, so that hardly anything repeats. --wait-ms: every stage
waits so long for each frame, however many tokens it has, as a GPU does whose launches cost more than its
arithmetic.
Trips are those that the answer waits for: one for each token but the right guesses.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from itertools import islice, pairwise
from pathlib import Path

from deploy.bench_prompts import prompts
from tests.benchmarks.guessed_answer import ask
from tests.ring_processes import RingProcesses

DEMO = Path(__file__).parent.parent.parent / "deploy" / "demo" / "model"
NUM_LAYERS, VOCAB_SIZE = 9, 4096


def main() -> None:
    """Print a line for each round, then the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", choices=("demo", "random", "repeats"), default="demo")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--wait-ms", type=float, default=0.0, help="of each stage for each frame")
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    cuts = [round(i * NUM_LAYERS / args.stages) for i in range(args.stages + 1)]
    layers = list(pairwise(cuts))
    waits = {
        rank: f"layer_delay_ms={args.wait_ms / (stop - start)}" for rank, (start, stop) in enumerate(layers)
    }
    drawn = prompts("random" if args.prompts == "random" else "demo", VOCAB_SIZE, args.prompt_tokens, 0)
    with ExitStack() as stack:
        rings = {}
        for method in ("off", "ngram"):
            rings[method] = stack.enter_context(
                RingProcesses(
                    Path(stack.enter_context(tempfile.TemporaryDirectory())),
                    DEMO,
                    layers,
                    concurrency=1,
                    context=1024,
                    faults=waits if args.wait_ms else None,
                    env={"MLX_DISABLE_COMPILE": None},
                    speculation={"method": method},
                    prefix_cache=False,
                )
            )
        for ring in rings.values():
            ring.wait_ok()
            ask(ring, next(drawn), 16, 0.0)
        ratios, trips, guessed = [], [], [0, 0]
        for number, text in enumerate(islice(drawn, args.rounds)):
            prompt = [*text, *text[: len(text) // 2]] if args.prompts == "repeats" else text
            heat = 1.0 if args.prompts == "random" else 0.0
            took = {}
            for method in list(rings) if number % 2 else list(reversed(rings)):
                took[method] = ask(rings[method], prompt, args.output_tokens, heat)
            off, on = took["off"], took["ngram"]
            ratios.append(off.took_s / on.took_s)
            trips.append(off.num_trips / on.num_trips)
            guessed[0] += on.num_guessed
            guessed[1] += on.num_right
            print(
                f"round {number}: speed {ratios[-1]:.2f} x, tokens a trip {trips[-1]:.2f} x, "
                f"guesses right {on.num_right} of {on.num_guessed}, "
                f"{'same tokens' if off.tokens == on.tokens else 'OTHER TOKENS'}, "
                f"{off.took_s / len(off.tokens) * 1e3:.1f} ms a token",
                flush=True,
            )
    share = guessed[1] / guessed[0] if guessed[0] else 0.0
    print(
        f"median: speed {statistics.median(ratios):.2f} x, tokens a trip {statistics.median(trips):.2f} x; "
        f"right: {share:.0%} of {guessed[0]}"
    )


if __name__ == "__main__":
    main()
