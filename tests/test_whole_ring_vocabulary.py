"""A vocabulary as large as those of real models: the first grammar of all is no pause for others."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest

from cluster.grammar import json_object_grammar
from proto import head_pb2, head_pb2_grpc
from tests.ring_processes import RingProcesses
from tests.tiny_models import SPECIALS, byte_alphabet, write_checkpoint
from tests.waiting import wait_for

VOCAB_SIZE = 151_936
NUM_LAYERS = 5


def with_large_vocabulary(model: Path) -> None:
    """Its tokenizer gets random words of letters and blanks, each of two shorter ones."""
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    draws, alphabet = random.Random(1), byte_alphabet()
    words = [char for char in alphabet if char.isascii() and char.isalpha()]
    vocab, merges = {char: i for i, char in enumerate(alphabet)}, []
    while len(vocab) + len(SPECIALS) < VOCAB_SIZE - 256:
        left, right = draws.choice(words), draws.choice(words)
        if len(left + right) <= 14 and left + right not in vocab:
            vocab[left + right] = len(vocab) + len(SPECIALS)
            merges.append(f"{left} {right}")
            words.append(left + right)
    tokenizer["model"] |= {"vocab": vocab, "merges": merges}
    file.write_text(json.dumps(tokenizer, ensure_ascii=False))


@pytest.mark.long
def test_the_first_grammar_does_not_break_the_ring_for_others(tmp_path: Path) -> None:
    """Made within the stage, the view of the vocabulary kept its heartbeats back for more than a second."""
    model = write_checkpoint(
        "llama", tmp_path / "model", num_layers=NUM_LAYERS, overrides={"vocab_size": VOCAB_SIZE}
    )
    with_large_vocabulary(model)
    with RingProcesses(tmp_path, model, [(0, 1), (1, 4), (4, 5)], context=4000) as ring:
        epoch = ring.wait_ok().epoch
        drawn, stopping = [0], threading.Event()
        request = head_pb2.GenerateRequest(request_id="other", prompt=[1, 2, 3], max_tokens=3900)

        def write() -> None:
            with ring.channel() as channel:
                for reply in head_pb2_grpc.HeadStub(channel).Generate(request):
                    drawn[0] += len(reply.tokens)
                    if stopping.is_set():
                        return

        writer = threading.Thread(target=write, name="other client")
        writer.start()
        try:
            wait_for(lambda: drawn[0] > 5, 30.0)
            replies = ring.generate([5, 6, 7], 4, grammar=json_object_grammar())
            assert replies[0].tokens[0].id == ord("{")
            before = drawn[0]
            wait_for(lambda: drawn[0] > before or not writer.is_alive(), 30.0)
            assert writer.is_alive()
        finally:
            stopping.set()
            writer.join(30.0)
        assert ring.wait_ok().epoch == epoch
