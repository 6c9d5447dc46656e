"""Train the bundled demo model: `python -m deploy.demo.train --help`; one process, one thread.

It reads the standard library of the Python that runs it (corpus.py), trains a `qwen3_moe` of mlx-lm with MLX
on the default device, keeps the weights with the best held-out loss, writes them as a float32 checkpoint, and
quantises that into the model folder of the repository (export.py). Minutes on a large GPU, a day on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn
from mlx.optimizers import AdamW, clip_grad_norm, cosine_decay, join_schedules, linear_schedule
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import qwen3_moe
from tokenizers import Tokenizer

from deploy.demo.corpus import Corpus, build_corpus
from deploy.demo.export import held_out_loss, write_float32, write_model

# Every linear that gets quantised has dimensions that are multiples of 128; the router stays float32.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "bos_token_id": None,
    "decoder_sparse_step": 1,
    "eos_token_id": 0,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 256,
    "max_position_embeddings": 4096,
    "mlp_only_layers": [],
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 9,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 4096,
}


class TrainingMoE(qwen3_moe.Qwen3MoeSparseMoeBlock):  # type: ignore[misc]
    """The same block and the same weights, computed densely: every expert for every token, then masked.

    The experts are tiny, and side by side they are one matmul, which every backend can differentiate.
    """

    def __call__(self, x: mx.array) -> mx.array:  # (B, T, hidden) -> (B, T, hidden)
        experts = self.switch_mlp
        gates = mx.softmax(self.gate(x), axis=-1, precise=True)  # (B, T, E)
        least = mx.topk(mx.stop_gradient(gates), self.top_k, axis=-1).min(axis=-1, keepdims=True)
        chosen = gates >= least
        scores = mx.where(chosen, gates, 0.0)
        scores = scores / scores.sum(axis=-1, keepdims=True)
        # Switch Transformer's balance term (arXiv 2101.03961, equation 4); 1.0 when all are used alike.
        used = chosen.astype(mx.float32).mean(axis=(0, 1)) / self.top_k
        self._balance = self.num_experts * (used * gates.astype(mx.float32).mean(axis=(0, 1))).sum()

        gate, up = (
            w.flatten(0, 1) for w in (experts.gate_proj.weight, experts.up_proj.weight)
        )  # (E * I, hidden)
        down = experts.down_proj.weight.swapaxes(1, 2).flatten(0, 1)  # (E * I, hidden)
        inner = nn.silu(x @ gate.T) * (x @ up.T)  # (B, T, E * I)
        inner = mx.unflatten(inner, -1, (self.num_experts, -1)) * scores[..., None].astype(x.dtype)
        y: mx.array = inner.flatten(-2) @ down
        return y


class TrainingLayer(qwen3_moe.Qwen3MoeDecoderLayer):  # type: ignore[misc]
    """A decoder layer with dropout on what it adds to the residual stream."""

    def __init__(self, args: qwen3_moe.ModelArgs, index: int, dropout: float) -> None:
        super().__init__(args, index)
        self.mlp = TrainingMoE(args)
        self.dropout = nn.Dropout(dropout)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), mask, cache))
        y: mx.array = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return y


def build_model(config: dict[str, Any], dropout: float) -> nn.Module:
    args = qwen3_moe.ModelArgs.from_dict(config)
    model = qwen3_moe.Model(args)
    model.model.layers = [TrainingLayer(args, index, dropout) for index in range(args.num_hidden_layers)]
    shrink = 1 / math.sqrt(2 * args.num_hidden_layers)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.switch_mlp.down_proj):
            linear.weight = linear.weight * shrink
    return model


def batches(corpus: Corpus, batch: int, context: int, seed: int) -> Iterator[npt.NDArray[np.uint16]]:
    """(batch, context + 1) windows for ever: half of them start with a document, half anywhere.

    Every fourth is (batch / 4, 4 * context + 1), so that long contexts are learnt as well.
    """
    rng = np.random.default_rng(seed)
    last = len(corpus.train) - 4 * context - 1
    starts = corpus.train_starts[corpus.train_starts <= last]
    for number in itertools.count(1):
        rows, width = (max(1, batch // 4), 4 * context) if number % 4 == 0 else (batch, context)
        offsets = np.concatenate([rng.choice(starts, rows // 2), rng.integers(0, last + 1, rows - rows // 2)])
        yield corpus.train[offsets[:, None] + np.arange(width + 1)]


def make_loss(model: nn.Module, dtype: mx.Dtype, balance: float) -> Callable[..., tuple[mx.array, mx.array]]:
    """(parameters, windows) -> (what is minimised, cross entropy in nats per token), computed in `dtype`."""

    def loss(parameters: dict[str, Any], windows: mx.array) -> tuple[mx.array, mx.array]:
        model.update(tree_map(lambda p: p.astype(dtype), parameters))
        logits = model(windows[:, :-1]).astype(mx.float32)
        entropy = nn.losses.cross_entropy(logits, windows[:, 1:], reduction="mean")
        uneven = sum(layer.mlp._balance for layer in model.model.layers) / len(model.model.layers)
        return entropy + balance * uneven, entropy

    return loss


def train(model: nn.Module, corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Train `model`, write its best weights to `args.work`/best.safetensors at each improvement.

    Ends after `args.steps` or once `args.minutes` are over. Returns what the README says about the run.
    The forward pass is in `args.dtype`, weights and optimizer are in float32.
    """
    warm_up = max(1, min(500, args.steps // 20))
    schedule = join_schedules(
        [
            linear_schedule(0.0, args.rate, warm_up),
            cosine_decay(args.rate, args.steps - warm_up, args.rate / 50),
        ],
        [warm_up],
    )
    optimizer = AdamW(schedule, betas=[0.9, 0.95], weight_decay=args.weight_decay, bias_correction=True)
    parameters = model.trainable_parameters()
    optimizer.init(parameters)
    gradient = mx.value_and_grad(make_loss(model, getattr(mx, args.dtype), args.balance))
    state = [parameters, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(windows: mx.array) -> mx.array:
        (_, entropy), grads = gradient(state[0], windows)
        grads, _ = clip_grad_norm(grads, 1.0)
        state[0] = optimizer.apply_gradients(grads, state[0])
        return entropy

    started, best, recent = time.monotonic(), math.inf, []
    windows = batches(corpus, args.batch, args.context, args.seed)
    best_step = 0
    for number in range(1, args.steps + 1):
        recent.append(step(mx.array(next(windows).astype(np.int32))))
        mx.async_eval(state, recent[-1])
        is_over = time.monotonic() - started > args.minutes * 60
        if number % args.eval_every and number != args.steps and not is_over:
            continue
        model.update(state[0])
        model.eval()
        loss = held_out_loss(model, corpus.held_out[: args.eval_tokens], args.context, args.batch)
        model.train()
        elapsed = time.monotonic() - started
        speed = number * args.batch * args.context / elapsed
        print(
            f"step {number}: train {mx.stack(recent).mean().item():.4f}, held out {loss:.4f}, "
            f"{elapsed:.0f} s, {speed:.0f} tokens/s",
            flush=True,
        )
        recent = []
        if loss < best:
            best, best_step = loss, number
            mx.save_safetensors(str(args.work / "best.safetensors"), dict(tree_flatten(state[0])))
        if is_over:
            break
    return {"best_step": best_step, "train_s": round(elapsed), "tokens": number * args.batch * args.context}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo.train", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work", type=Path, default=Path("build/demo"), help="tokens and checkpoints go here"
    )
    parser.add_argument("--out", type=Path, help="write the 8-bit model folder here (default: do not)")
    parser.add_argument(
        "--float32", type=Path, help="write the unquantised checkpoint here (default: WORK/float32)"
    )
    parser.add_argument("--only-corpus", action="store_true", help="stop when the tokens are in WORK")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the router's balance term")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the forward pass"
    )
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--eval-tokens", type=int, default=200_000, help="held-out tokens per evaluation")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    tokens, vocabulary = args.work / "corpus.npz", args.work / "tokenizer.json"
    if not (tokens.exists() and vocabulary.exists()):
        corpus, tokenizer = build_corpus(CONFIG["vocab_size"])
        corpus.save(tokens)
        tokenizer.save(str(vocabulary), pretty=False)
    corpus, tokenizer = Corpus.load(tokens), Tokenizer.from_file(str(vocabulary))
    print(
        f"{len(corpus.train)} tokens to train on, {len(corpus.held_out)} held out: {corpus.facts}", flush=True
    )
    if args.only_corpus:
        return

    mx.random.seed(args.seed)
    config = CONFIG | {"num_hidden_layers": args.layers}
    facts = train(build_model(config, args.dropout), corpus, args)
    facts["device"] = mx.device_info().get("device_name", str(mx.default_device()))
    facts["arguments"] = " ".join(sys.argv[1:] if arguments is None else arguments)
    (args.work / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    float32 = args.float32 or args.work / "float32"
    best: dict[str, mx.array] = mx.load(str(args.work / "best.safetensors"))  # type: ignore[assignment]
    write_float32(float32, best, config, tokenizer)
    if args.out:
        write_model(args.out, float32, args.work)


if __name__ == "__main__":
    main()
