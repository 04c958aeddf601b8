"""The parts of a causal language model of any family: blocks, trunk, and what follows the trunk.

All values are computed by the model's own code: states are the outputs of its blocks, logits are what its forward makes
of the trunk's output, with the scales, caps and biases of its family. At load the parts are compared once with a whole
pass of the model, bit for bit.

Shape legend: T tokens, L layers, d width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from raymem.errors import UnsupportedModel

# tokens of the pass that parts are compared in; a window of one has nothing before it
_PROBE = 5


@dataclass(frozen=True)
class Parts:
    """What a model is made of.

    `trunk` makes final states `[1, T, d]` of token ids, `blocks` are its layers in order, and `head` is the model with
    a trunk that returns the states it is given.
    """

    trunk: nn.Module
    blocks: Sequence[nn.Module]
    head: nn.Module

    def run(self, tokens_T: Tensor, layers: Sequence[int], cache: Any = None) -> tuple[Tensor, Tensor]:
        """States `[T, L, d]` after the blocks of these numbers, and the trunk's output `[T, d]`.

        A `cache` of transformers holds the keys and values that the tokens follow, and takes in theirs.
        """
        kept: dict[int, Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for layer in set(layers):
                hooks.enter_context(_keeping(self.blocks[layer - 1], layer, kept))
            given = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
            final_Td = self.trunk(input_ids=tokens_T[None], **given).last_hidden_state[0]
        return torch.stack([kept[layer] for layer in layers], dim=1), final_Td

    def logits(self, final_Td: Tensor) -> Tensor:
        """Logits `[T, V]` of what the trunk gave out."""
        logits_TV: Tensor = self.head(inputs_embeds=final_Td[None], use_cache=False).logits[0]
        return logits_TV


def parts_of(model: Any, depth: int) -> Parts:
    """Find the parts of a model of transformers, and check that they compute what the whole does.

    Args:
        model: a causal language model in evaluation mode.
        depth: how many layers its config says.

    Raises:
        UnsupportedModel: it has no such parts, or they don't give what a pass of its own gives.
    """
    name = type(model).__name__
    ids_T = torch.arange(1, 1 + _PROBE).clamp(max=int(model.config.get_text_config().vocab_size) - 1)
    with torch.inference_mode():
        whole = model(input_ids=ids_T[None], use_cache=False, output_hidden_states=True)
        for trunk in _trunks(model):
            found = _taken_apart(model, trunk, depth)
            if found is not None and _same(found, ids_T, whole, depth):
                return found
    raise UnsupportedModel(
        f"{name}: its layers and logits can't be had one by one with the bits of its own forward pass: "
        "raymem reads decoder-only language models whose layers follow each other"
    )


class _Given(nn.Module):
    """Takes a trunk's place, and returns the states that it is given."""

    def forward(self, *_args: Any, inputs_embeds: Tensor, **_more: Any) -> Any:
        return _output_type()(last_hidden_state=inputs_embeds)


@lru_cache
def _output_type() -> type[Any]:
    from transformers.utils import ModelOutput

    @dataclass
    class Final(ModelOutput):
        """States after the trunk, without anything else that a family's trunk may give."""

        last_hidden_state: Tensor | None = None

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return Final


def _trunks(model: Any) -> Iterator[nn.Module]:
    seen: list[nn.Module] = [model]
    for found in (model.get_decoder(), model.base_model):
        if all(found is not other for other in seen):
            seen.append(found)
            yield found


def _taken_apart(model: Any, trunk: nn.Module, depth: int) -> Parts | None:
    path = next((name for name, module in model.named_modules() if module is trunk), "")
    lists = (part for part in trunk.modules() if isinstance(part, nn.ModuleList) and len(part) == depth)
    blocks = next(lists, None)
    if not path or blocks is None:
        return None
    return Parts(trunk, list(blocks), _with_part(model, path.split("."), _Given()))


def _with_part(module: nn.Module, path: list[str], part: nn.Module) -> nn.Module:
    """The same module, sharing every parameter, but for the part at a path."""
    made = copy.copy(module)
    inner = part if len(path) == 1 else _with_part(module._modules[path[0]], path[1:], part)  # type: ignore[arg-type]
    made._modules = dict(module._modules) | {path[0]: inner}
    return made


def _same(parts: Parts, ids_T: Tensor, whole: Any, depth: int) -> bool:
    try:
        hidden_TLd, final_Td = parts.run(ids_T, range(1, depth + 1))
        logits_TV = parts.logits(final_Td)
    except (TypeError, AttributeError, KeyError, RuntimeError, ValueError):
        # a part that is no trunk, layers that hand on something else: another candidate, or none
        return False
    inside = whole.hidden_states[1:depth]
    if whole.logits.shape[1:] != logits_TV.shape or not torch.equal(whole.logits[0], logits_TV):
        return False
    return len(inside) == depth - 1 and all(torch.equal(hidden_TLd[:, n], state[0]) for n, state in enumerate(inside))


@contextlib.contextmanager
def _keeping(block: nn.Module, layer: int, kept: dict[int, Tensor]) -> Iterator[None]:
    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        kept[layer] = (output[0] if isinstance(output, (tuple, list)) else output)[0]

    handle = block.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
