"""One user's answers with a draft model, with repetitions looked up, and with neither: rings asked in turns.

    python -m tests.benchmarks.draft_model [--draft-layers 0,1,2,3,7,8] [--stages 3] [--wait-ms 10] [--heat 0]

The model is the demo's, its draft model the demo model without some of its layers: nothing is trained for it,
and it guesses about half of the tokens. --wait-ms: every stage waits so long for each frame, however many
tokens it has, as the link to another machine does. Prompts are held-out text of the demo's domain. Tokens a
trip are those that a trip of the answer brings on the average.
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
from tests.pruned_model import write_pruned
from tests.ring_processes import RingProcesses

DEMO = Path(__file__).parent.parent.parent / "deploy" / "demo" / "model"
NUM_LAYERS, VOCAB_SIZE = 9, 4096


def num_passes(ring: RingProcesses) -> int:
    """Of the draft model, since it was loaded; 0 where there is none."""
    return ring.node_status(0).drafter.num_passes


def main() -> None:
    """Print a line for each round, then the medians. Speed: against the first method, in the same round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--draft-layers", default="0,1,2,3,7,8", help="of the demo model's nine")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--wait-ms", type=float, default=0.0, help="of each stage for each frame")
    parser.add_argument("--heat", type=float, default=0.0, help="the temperature")
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--max-draft-tokens", type=int, default=8)
    parser.add_argument("--methods", default="off,ngram,draft")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    layers = list(pairwise(round(i * NUM_LAYERS / args.stages) for i in range(args.stages + 1)))
    waits = {
        rank: f"layer_delay_ms={args.wait_ms / (stop - start)}" for rank, (start, stop) in enumerate(layers)
    }
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        draft = write_pruned(DEMO, place / "draft", [int(n) for n in args.draft_layers.split(",")])
        rings = {
            method: stack.enter_context(
                RingProcesses(
                    Path(stack.enter_context(tempfile.TemporaryDirectory())),
                    DEMO,
                    layers,
                    concurrency=1,
                    context=1024,
                    faults=waits if args.wait_ms else None,
                    env={"MLX_DISABLE_COMPILE": None},
                    speculation={
                        "method": method,
                        "draft_model": str(draft),
                        "max_draft_tokens": args.max_draft_tokens,
                    },
                    prefix_cache=False,
                )
            )
            for method in args.methods.split(",")
        }
        drawn = prompts("demo", VOCAB_SIZE, args.prompt_tokens, 0)
        for ring in rings.values():
            ring.wait_ok()
            ask(ring, next(drawn), 24, args.heat)
        found: dict[str, list[tuple[float, float, int, int, int]]] = {method: [] for method in rings}
        for number, prompt in enumerate(islice(drawn, args.rounds)):
            answers: list[list[int]] = []
            for method in list(rings) if number % 2 else list(reversed(rings)):
                before = num_passes(rings[method])
                one = ask(rings[method], prompt, args.output_tokens, args.heat)
                num_drafts = num_passes(rings[method]) - before
                answers.append(one.tokens)
                num = len(one.tokens)
                ms = one.took_s / max(1, num - 1) * 1e3
                found[method].append((ms, num / one.num_trips, one.num_guessed, one.num_right, num_drafts))
            is_same = all(tokens == answers[0] for tokens in answers)
            line = "; ".join(
                f"{m} {rows[-1][0]:.1f} ms a token, {rows[-1][1]:.2f} a trip, {rows[-1][4]} passes"
                for m, rows in found.items()
            )
            print(f"round {number}: {line}; {'same tokens' if is_same else 'OTHER TOKENS'}", flush=True)
        print("| method | ms a token | speed | tokens a trip | guesses right | passes of the draft model |")
        print("|---|---|---|---|---|---|")
        first = next(iter(found.values()))
        for method, rows in found.items():
            guessed, right = sum(row[2] for row in rows), sum(row[3] for row in rows)
            speed = statistics.median(one[0] / row[0] for one, row in zip(first, rows, strict=True))
            print(
                f"| {method} | {statistics.median(row[0] for row in rows):.1f} | {speed:.2f} | "
                f"{statistics.median(row[1] for row in rows):.2f} | {right} of {guessed} | "
                f"{sum(row[4] for row in rows)} |"
            )


if __name__ == "__main__":
    main()
