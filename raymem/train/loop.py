"""The optimiser's loop: seeded step by step, and resumed from a checkpoint to the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from raymem.errors import Corrupt, StorageError
from raymem.memory.base import Memory
from raymem.storage.tables.disk import fsync

Progress = Callable[[int, int], None]
_KEY = "raymem"
_LAST_RATE = 0.02
_LONGEST_STEP = 1.0


class Task(ABC):
    """One thing to train: weights, a loss, and figures on held-out rows."""

    metric: str
    """What the figures say, in words."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Leaves that the optimiser changes, by name; always in one order."""

    @abstractmethod
    def loss(self, generator: torch.Generator) -> Tensor:
        """The loss of one step, a scalar; all chance comes from `generator`."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """Figures on held-out rows: of the trained weights, under "trained", and of alternatives without training."""

    @abstractmethod
    def learned(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """The tensors to keep and the options that a bank needs for them; see Learned."""


class TrainingLoop:
    """Adam with a falling rate over a task.

    Args:
        task: freshly made.
        steps: how many in all.
        rate: Adam's, at first.
        seed: of every step's own generator, so that a step draws the same whether or not the run was cut before it.
        checkpoint: file that is written every `every` steps, and read first if it is there.
        identity: what a checkpoint must say to be this run's.
    """

    def __init__(
        self, task: Task, *, steps: int, rate: float, seed: int, checkpoint: Path, every: int, identity: dict[str, Any]
    ) -> None:
        self._task = task
        self._weights = task.weights()
        self._steps, self._rate, self._seed = steps, rate, seed
        self._path, self._every, self._identity = checkpoint, every, identity
        self._optimiser = torch.optim.Adam(list(self._weights.values()), lr=rate)

    def run(self, progress: Progress | None = None) -> int:
        """Train to the end; return the step that the run went on from, 0 for a new one.

        Raises:
            Corrupt: the checkpoint is damaged. StorageError: it can't be written.
        """
        first = self._restore()
        for step in range(first, self._steps):
            self._step(step)
            if progress is not None:
                progress(step + 1, self._steps)
            if (step + 1) % self._every == 0 or step + 1 == self._steps:
                self._save(step + 1)
        return first

    def _step(self, step: int) -> None:
        share = step / max(1, self._steps - 1)
        for group in self._optimiser.param_groups:
            group["lr"] = self._rate * (1 - (1 - _LAST_RATE) * share)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        self._optimiser.zero_grad()
        with torch.enable_grad():
            self._task.loss(generator).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(self._weights.values()), _LONGEST_STEP)
        self._optimiser.step()

    def _save(self, step: int) -> None:
        tensors = {f"weight.{name}": tensor.detach() for name, tensor in self._weights.items()}
        for index, kept in self._optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": tensor for name, tensor in kept.items()}
        head = json.dumps(self._identity | {"step": step}, sort_keys=True)
        write_whole(self._path, save({name: t.contiguous() for name, t in tensors.items()}, {_KEY: head}))

    def _restore(self) -> int:
        found = read_checkpoint(self._path)
        if found is None:
            return 0
        head, tensors = found
        try:
            state = self._optimiser.state_dict()
            for index, (name, weight) in enumerate(self._weights.items()):
                weight.data.copy_(tensors[f"weight.{name}"])
                state["state"][index] = {n: tensors[f"adam.{index}.{n}"] for n in ("step", "exp_avg", "exp_avg_sq")}
            self._optimiser.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            raise Corrupt(f"checkpoint {self._path} lacks a part ({error}); start anew: --fresh") from error
        return int(head["step"])


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The head and the tensors of a checkpoint, None if there is none.

    Raises:
        Corrupt: it is damaged.
    """
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        head: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
        return head, load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, OSError) as error:
        raise Corrupt(f"checkpoint {path} can't be read ({error}); start anew: --fresh") from error


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file atomically.

    Raises:
        StorageError: it can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            fsync(Path(temporary))
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise StorageError(f"can't write {path}: {error}") from error


def weights_of(memory: Memory) -> dict[str, Tensor]:
    """A mechanism's parameters as a task's weights."""
    return dict(memory.requires_grad_(True).named_parameters())
