"""Fitting a retention agent: evict the rows that later rows won't ask for.

Jung et al. 2018 (arXiv 1812.04227) reward an agent for what later questions need. A journal holds its own questions:
a row is worth, at each later row, its cosine with it where both were followed by the same token. Actor and critic as in
the authors' EMR, with a reward at every step.

Shape legend: `B` episodes, `N` slots, `E = N + 1` entries, `T` decisions, `R` rows of an episode, `K` key width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from raymem.memory import build
from raymem.memory.base import Memory
from raymem.memory.learned import of_memory
from raymem.memory.lemn import Lemn
from raymem.memory.policies import Critic, Spatial, SpatioTemporal, advantages
from raymem.train.data import Lessons, hits, windows
from raymem.train.loop import Task, weights_of

# an episode's memory, its decisions, and the later rows that say what a decision cost
_SLOTS, _STEPS, _AHEAD, _BATCH = 16, 32, 64, 16
_VALUE, _ENTROPY, _DISCOUNT = 0.5, 0.01, 0.99


class Episode(NamedTuple):
    """Rows `[B, R, K]`, and `asked_BRR[b, i, q]`: how much row i answers of what is asked by rows up to q, in all."""

    rows_BRK: Tensor
    asked_BRR: Tensor


class Rollout(NamedTuple):
    """Log-probabilities, rewards, entropies `[T, B]` of decisions drawn, and the critic's values."""

    logs: Tensor
    rewards: Tensor
    entropies: Tensor
    values: Tensor


class LemnTask(Task):
    """The agents "s" and "st", in memories of 16 slots.

    Args:
        memory: of policy "s" or "st".
        lessons: rows.
    """

    metric = "next token among the best 8 candidates, memories of 16 slots; higher is better"

    def __init__(self, memory: Memory, lessons: Lessons) -> None:
        self.memory, self.lessons = cast(Lemn, memory), lessons
        self.agent = cast(Spatial, self.memory.policy)
        self._slots = min(_SLOTS, self.memory.slots)
        self._keys_NK = normalize(self.memory.project(lessons.rows.keys_NK), dim=-1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.critic = Critic(2 * self.agent.hidden, self.agent.hidden)

    def weights(self) -> dict[str, Tensor]:
        """The agent's and the critic's."""
        used = {name: weight for name, weight in weights_of(self.memory).items() if self._used(name)}
        return used | {f"critic.{name}": weight for name, weight in self.critic.named_parameters()}

    def loss(self, generator: torch.Generator) -> Tensor:
        """See Task."""
        done = self._rollout(self._episode(generator), generator)
        ahead = advantages(done.rewards, done.values.detach(), _DISCOUNT)
        returns = ahead + done.values.detach()
        scaled = (ahead - ahead.mean()) / (ahead.std() + 1e-6)
        actor = -(done.logs * scaled).mean() - _ENTROPY * done.entropies.mean()
        return actor + _VALUE * (returns - done.values).square().mean()

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """See Task."""
        options = self.memory.lemn.model_dump(exclude_none=True) | {"slots": self._slots}
        found: dict[str, float] = {}
        for name in (self.memory.lemn.policy, "fifo", "lru"):
            small = cast(Lemn, build("lemn", self.memory.dims, options | {"policy": name}, self.memory.budget_bytes))
            if name == self.memory.lemn.policy:
                small.policy.load_state_dict(self.agent.state_dict())
            found["trained" if name == self.memory.lemn.policy else name] = hits(
                small.requires_grad_(False), self.lessons
            )
        return found

    def learned(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """See Task."""
        return of_memory(self.memory), {"policy": self.memory.lemn.policy, "hidden": self.memory.lemn.hidden}

    def _used(self, name: str) -> bool:
        # the layers of the other agent have no gradient
        idle = "policy.weigh." if isinstance(self.agent, SpatioTemporal) else ("policy.over_time.", "policy.weigh_hist")
        return not name.startswith(idle)

    @torch.no_grad()
    def _episode(self, generator: torch.Generator) -> Episode:
        length = self._slots + _STEPS + _AHEAD
        starts = torch.randint(max(1, self.lessons.split - length + 1), (_BATCH,), generator=generator)
        rows, tokens = windows(self._keys_NK, starts, length), windows(self.lessons.rows.tokens_N, starts, length)
        answers = (rows @ rows.mT).clamp_min(0) * (tokens[:, :, None] == tokens[:, None])
        return Episode(rows, answers.cumsum(-1))

    def _rollout(self, episode: Episode, generator: torch.Generator) -> Rollout:
        batch, slots = len(episode.rows_BRK), self._slots
        held = torch.arange(slots).expand(batch, -1)
        history = torch.zeros(batch, slots, self.agent.hidden)
        judged: Tensor | None = None
        found: list[tuple[Tensor, ...]] = []
        for t in range(slots, slots + _STEPS):
            held = torch.cat([held, torch.full((batch, 1), t)], 1)
            history = torch.cat([history, torch.zeros(batch, 1, self.agent.hidden)], 1)
            keys = episode.rows_BRK.gather(1, held[..., None].expand(-1, -1, episode.rows_BRK.shape[-1]))
            encoded = self.agent.encode(keys)
            logits, after = self.agent.score(encoded, history)
            log_p = torch.log_softmax(logits, -1)
            goes = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            value, judged = self.critic(encoded.detach(), judged)
            reward = -self._worth(episode, held.gather(1, goes), t)
            entropy = -(log_p.exp() * log_p).sum(-1)
            found.append((log_p.gather(1, goes)[:, 0], reward, entropy, value))
            stays = ~one_hot(goes[:, 0], slots + 1).bool()
            held = held[stays].reshape(batch, slots)
            history = (history if after is None else after)[stays].reshape(batch, slots, -1)
        return Rollout(*(torch.stack(part) for part in zip(*found, strict=True)))

    def _worth(self, episode: Episode, rows_B1: Tensor, t: int) -> Tensor:
        """How much of what the 64 rows after row t ask these rows would have answered, `[B]`."""
        asked_BR = episode.asked_BRR.gather(1, rows_B1[..., None].expand(-1, -1, episode.asked_BRR.shape[-1]))[:, 0]
        return asked_BR[:, t + _AHEAD - 1] - asked_BR[:, t]
