"""Titans in a trained model: associative recall of more pairs than any seen, beside linear attention."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, elu, normalize, silu

from raymem.memory import build
from raymem.memory.base import Dims

WIDTH, WORDS, PAIRS = 32, 64, 8
# so few keys that most are bound again
REBOUND = 16


class TitansLayer(nn.Module):
    """The mechanism with learned gates, one gradient step a pair; it reads when all is written."""

    def __init__(self) -> None:
        super().__init__()
        options = {"learned": True, "eta": 0.1, "theta": 0.4, "alpha": 1e-3, "chunk": 1}
        self.memory = build("titans", Dims(WIDTH, WIDTH), options, 2**26)

    def forward(self, keys, values, queries):
        keys, queries = normalize(keys, dim=-1), normalize(queries, dim=-1)
        tokens = torch.zeros(keys.shape[:2], dtype=torch.int64)
        state = self.memory.write(self.memory.init_state(len(keys)), keys, values, tokens)
        return self.memory.read(state, queries, 0).values_BQV


class LinearAttention(nn.Module):
    """Katharopoulos et al. 2020 (2006.16236): feature map `elu + 1`, normalised."""

    def forward(self, keys, values, queries):
        keys, queries = elu(keys) + 1, elu(queries) + 1
        return queries @ (keys.mT @ values) / (queries @ keys.sum(1)[..., None])


class OuterProducts(nn.Module):
    """Linear attention without feature map and norm, on unit keys."""

    def forward(self, keys, values, queries):
        return normalize(queries, dim=-1) @ (normalize(keys, dim=-1).mT @ values)


class Recaller(nn.Module):
    """Embeddings and projections as in the paper (4.4), a memory between them."""

    def __init__(self, memory: nn.Module) -> None:
        super().__init__()
        self.words = nn.ModuleList(nn.Embedding(WORDS, WIDTH) for _ in range(2))
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.memory, self.output = memory, nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS))

    def forward(self, keys, values, queries):
        embed_key, embed_value = self.words
        key, value, query = self.projections
        found = self.memory(silu(key(embed_key(keys))), value(embed_value(values)), silu(query(embed_key(queries))))
        return self.output(found)


def drawn(count: int, pairs: int, generator, keys: int | None):
    """Keys, values, queries, answers `[count, pairs]`; the newest binding of `keys` keys counts (None: all differ)."""
    if keys is None:
        bound = torch.rand(count, WORDS, generator=generator).argsort(1)[:, :pairs]
    else:
        bound = torch.randint(keys, (count, pairs), generator=generator)
    values = torch.randint(WORDS, (count, pairs), generator=generator)
    newest = torch.zeros(count, WORDS, dtype=torch.int64)
    for key, value in zip(bound.split(1, 1), values.split(1, 1), strict=True):
        newest.scatter_(1, key, value)
    queries = bound[:, torch.randperm(pairs, generator=generator)]
    return bound, values, queries, newest.gather(1, queries)


def accuracy(make, seed: int, updates: int, keys: int | None) -> float:
    """Share of right answers at four times the pairs it was trained on."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Recaller(make())
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, updates)
    for _ in range(updates):
        *asked, answers = drawn(32, PAIRS, generator, keys)
        optimizer.zero_grad()
        cross_entropy(model(*asked).flatten(0, 1), answers.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    *asked, answers = drawn(200, 4 * PAIRS, torch.Generator().manual_seed(99), keys)
    with torch.no_grad():
        return (model(*asked).argmax(-1) == answers).float().mean().item()


def median(make, updates: int, keys: int | None) -> float:
    return sorted(accuracy(make, seed, updates, keys) for seed in range(3))[1]


def test_a_trained_memory_knows_the_newest_of_many_bindings_where_sums_of_them_are_all_that_attention_has():
    assert accuracy(TitansLayer, 0, 300, REBOUND) >= 0.95
    for other in (LinearAttention, OuterProducts):
        assert accuracy(other, 0, 300, REBOUND) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "task"), [(None, "keys differ"), (REBOUND, "16 keys, the newest value counts")])
def test_it_recalls_four_times_the_pairs_it_was_trained_on(keys, task, figure):
    others = {"linear attention": LinearAttention, "without feature map, unit keys": OuterProducts}
    baseline = {name: median(make, 1200, keys) for name, make in others.items()}
    found = median(TitansLayer, 1200, keys)
    figure("titans", f"MQAR, 32 pairs, trained on 8, {task}", found, above=0.94, baseline=baseline)
    assert found > baseline["linear attention"] + 0.2
