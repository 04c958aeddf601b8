"""SPALM's gate, trained on a bank's own tokens with a small model of its own kind."""

import pytest
import torch
from torch import Tensor

from raymem import Trace
from raymem.encode.encoder import Encoder, assemble
from raymem.errors import Corrupt, InvalidInput
from raymem.lm.gate import Gate
from raymem.lm.mixing import Mixer
from raymem.lm.models import Pass
from raymem.memory.learned import Learned, name_of
from raymem.train.data import lessons_of
from raymem.train.loop import TrainingLoop
from raymem.train.spalm import GateSetup, SpalmTask

VOCABULARY, WIDTH = 60, 24


class Bigrams:
    """A model that knows what follows odd tokens; its states tell the last two tokens."""

    def __init__(self, follows: Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        self.embedding = torch.randn(VOCABULARY, WIDTH, generator=generator)
        self.table = torch.zeros(VOCABULARY, VOCABULARY)
        known = torch.arange(1, VOCABULARY, 2)
        self.table[known, follows[known]] = 6.0

    def run_cached(self, tokens_T: Tensor, layers: tuple[int, ...]) -> Pass:
        before = torch.cat([tokens_T[:1], tokens_T[:-1]])
        hidden = (self.embedding[tokens_T] + 0.3 * self.embedding[before] + 0.5).bfloat16()
        return Pass(hidden[:, None].repeat(1, len(layers), 1), tokens_T.float()[:, None])

    def logits(self, final_Td: Tensor) -> Tensor:
        return self.table[final_Td[:, 0].long()]


@pytest.fixture
def model() -> Bigrams:
    return Bigrams(follows())


def follows() -> Tensor:
    return torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))


def walk(count: int) -> Tensor:
    """Tokens that follow each other by one rule; at first nothing is to be learned of what follows odd ones."""
    generator, rule, tokens = torch.Generator().manual_seed(2), follows(), [0]
    for number in range(count - 1):
        strays = tokens[-1] % 2 == 1 and number < count * 0.6
        tokens.append(int(torch.randint(VOCABULARY, (), generator=generator)) if strays else int(rule[tokens[-1]]))
    return torch.tensor(tokens)


@pytest.fixture
def task(store, cold, tiny, model) -> SpalmTask:
    tokens = walk(1500)
    store.create("lab/spalm", tiny.spec("spalm")).write(
        Trace(model.run_cached(tokens, (3, 5)).hidden_TLd, tokens, "s", "r")
    )
    entry = cold.catalog.get("lab/spalm")
    encoder, memory = assemble(entry.spec, tiny.calibration)
    lessons = lessons_of(cold, entry, 5000, 640)
    return SpalmTask(GateSetup(memory, encoder, model, cold.journal(entry), (3, 5), lessons.sources), lessons)


def loop(task: SpalmTask, path, steps: int = 60) -> TrainingLoop:
    return TrainingLoop(task, steps=steps, rate=0.05, seed=0, checkpoint=path, every=10, identity={})


def test_a_trained_gate_beats_the_shipped_one_and_the_best_fixed_weight(task, tmp_path, model):
    loop(task, tmp_path / "c").run()
    figures = task.figures()
    # memory is right about even tokens, the model about odd ones: no one weight does for both
    assert figures["trained"] < 0.9 * figures["best fixed weight"]
    assert figures["trained"] < 0.9 * figures["shipped gate"]
    assert figures["best fixed weight"] < figures["model alone"]


def test_the_gate_is_found_again_among_the_weights_and_reads(task, tmp_path):
    loop(task, tmp_path / "c", steps=3).run()
    blob = Learned("spalm", *task.learned()).to_bytes()
    gate = Gate.of_learned(Learned.from_bytes(blob, name_of(blob)))
    assert gate.taus == task.gate.taus
    assert torch.equal(gate.weight_GF, task.gate.weight_GF)
    Mixer({"spalm": gate})
    with pytest.raises(Corrupt, match="not a gate"):
        Gate.of_learned(Learned("lemn", {}))


def test_a_cut_run_ends_with_the_same_bits(task, tmp_path, store, cold, tiny, model):
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 15:
            raise Killed

    with pytest.raises(Killed):
        loop(task, tmp_path / "c", 30).run(kill)
    entry = cold.catalog.get("lab/spalm")
    lessons = lessons_of(cold, entry, 5000, 640)
    encoder, memory = assemble(entry.spec, tiny.calibration)
    again, whole = (
        SpalmTask(GateSetup(memory, encoder, model, cold.journal(entry), (3, 5), lessons.sources), lessons)
        for _ in "ab"
    )
    assert loop(again, tmp_path / "c", 30).run() == 10
    loop(whole, tmp_path / "d", 30).run()
    for name, tensor in again.learned()[0].items():
        assert torch.equal(tensor, whole.learned()[0][name]), name


def test_runs_too_short_to_read_again_are_refused(store, cold, tiny, model):
    bank = store.create("lab/short", tiny.spec("spalm"))
    for run in range(100):
        bank.write(tiny.trace(10, run=str(run), seed=run))
    entry = cold.catalog.get("lab/short")
    lessons = lessons_of(cold, entry, 5000, 640)
    encoder, memory = Encoder(entry.spec, tiny.calibration), assemble(entry.spec, tiny.calibration)[1]
    with pytest.raises(InvalidInput, match="write longer runs"):
        SpalmTask(GateSetup(memory, encoder, model, cold.journal(entry), (3, 5), lessons.sources), lessons)
