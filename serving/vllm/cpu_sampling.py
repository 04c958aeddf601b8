"""vLLM's sampler on CPUs: tested when an engine starts, and replaced where it is wrong.

Extraction makes every decoding step a speculative one, so each token is sampled by vLLM's rejection sampler. Its
kernels are written in Triton; on CPUs vLLM puts others in their place, and two of those of vLLM 0.32 are wrong: one
never writes temperatures, top-p and top-k, the other accepts drafts that are padding. Correct kernels are left alone.

Shape legend: N requests, T drafted tokens of all requests, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raymem.errors import Unsupported
from raymem.logs import get_logger

log = get_logger("raymem.vllm")

_SAMPLER = "vllm.v1.sample.rejection_sampler"


@dataclass(frozen=True)
class _Probe:
    """One launch of a kernel with a known answer: inputs by name, the output's name, and its expected values."""

    inputs: dict[str, Any]
    output: str
    expected: list[Any]

    def right(self, kernel: Any) -> bool:
        """Whether the kernel gives the expected values; one that fails to launch does not."""
        inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        try:
            kernel[(len(_ENDS_N),)](**inputs)
        except (AttributeError, TypeError, RuntimeError) as error:
            log.warning("a kernel of vLLM's sampler can't be launched", reason=str(error))
            return False
        found: Any = inputs[self.output].tolist()
        return bool(found == self.expected)


def mend_sampler() -> list[str]:
    """Test the CPU kernels of vLLM's rejection sampler; return the names of those that were replaced.

    Safe to call again, in every worker process.

    Raises:
        Unsupported: one is wrong and can't be replaced, so that sampled text would be garbage.
    """
    sampler = importlib.import_module(_SAMPLER)
    wrong = [name for name, probes in _probes().items() if not _all_right(sampler, name, probes)]
    for name in wrong:
        _replace(sampler, name)
        log.warning(
            "vLLM's CPU kernel is wrong for speculative steps, which would sample garbage: raymem's is used",
            kernel=name,
        )
    return wrong


def _all_right(sampler: Any, name: str, probes: list[_Probe]) -> bool:
    kernel = getattr(sampler, name, None)
    return kernel is not None and all(probe.right(kernel) for probe in probes)


def _replace(sampler: Any, name: str) -> None:
    make = _REPLACEMENTS.get(name)
    if make is None or not hasattr(sampler, name):
        raise _beyond_mending(name)
    try:
        from vllm.triton_utils.dispatcher import register_kernels
    except ImportError as error:
        raise _beyond_mending(name) from error
    register_kernels({f"{_SAMPLER}.{name}": make(getattr(sampler, name))})
    if not _all_right(sampler, name, _probes()[name]):
        raise _beyond_mending(name)


def _beyond_mending(name: str) -> Unsupported:
    import vllm

    return Unsupported(
        f"vLLM {vllm.__version__} samples garbage beside extract_hidden_states on this CPU: its kernel {name} is "
        "wrong, and raymem knows no way to replace it. Use vLLM 0.32, with which raymem was tested, or a mended one"
    )


def _expand(_wrong: Any) -> Callable[..., None]:
    """Give each request's value to each of its drafted tokens, whatever its dtype."""

    def expand(*values: Any) -> None:
        output_T, input_N, ends_N, replace_from, replace_to = values[:5]
        counts_N = torch.diff(ends_N, prepend=ends_N.new_zeros(1))
        value_N = torch.where(input_N == replace_from, torch.as_tensor(replace_to, dtype=input_N.dtype), input_N)
        expanded_T = torch.repeat_interleave(value_N, counts_N.long())
        output_T[: len(expanded_T)] = expanded_T

    return expand


def _random(wrong: Any) -> Callable[..., None]:
    """Do what vLLM's own does, which reads outside of its table for a draft of -1, but never accept such a draft."""
    drafts, uniform = wrong.arg_names.index("draft_token_ids_ptr"), wrong.arg_names.index("uniform_probs_ptr")

    def random_sample(*values: Any) -> None:
        inputs = list(values)
        padding_T = inputs[drafts] < 0
        inputs[drafts] = inputs[drafts].clamp(min=0)
        # a draft is accepted when it is at least as likely as this: nothing is
        inputs[uniform] = inputs[uniform].masked_fill(padding_T, float("inf"))
        wrong(*inputs)

    return random_sample


_REPLACEMENTS: dict[str, Callable[[Any], Callable[..., None]]] = {
    "expand_kernel": _expand,
    "rejection_random_sample_kernel": _random,
}


# three requests with one draft, none and two, over a vocabulary of four
_ENDS_N = torch.tensor([1, 1, 3], dtype=torch.int32)
_DRAFTS_T = torch.tensor([2, 0, 1], dtype=torch.int32)
_TARGET_TV = torch.tensor([[0.1, 0.2, 0.6, 0.1], [0.6, 0.1, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4]])


def _probes() -> dict[str, list[_Probe]]:
    none, one_not = torch.tensor([False, False, False]), torch.tensor([True, False, True])
    return {
        "expand_kernel": [
            _expansion(torch.tensor([0.7, 1.5, 0.3]), [0.7, 0.3, 0.3], 0, 0),
            _expansion(torch.tensor([0.0, 1.5, 0.25]), [1.0, 0.25, 0.25], 0, 1),
            _expansion(torch.tensor([40, 3, 7], dtype=torch.int32), [40, 7, 7], 0, 0),
            _expansion(torch.tensor([40, 3, 0]), [40, 5, 5], 0, 5),
        ],
        "rejection_greedy_sample_kernel": [
            _greedy(None, [[2, 7, -1], [8, -1, -1], [0, 3, -1]]),
            _greedy(one_not, [[2, 7, -1], [-1, -1, -1], [0, 3, -1]]),
        ],
        "rejection_random_sample_kernel": [
            _random_sample(_DRAFTS_T, none, [[2, 7, -1], [8, -1, -1], [0, 2, -1]]),
            _random_sample(_DRAFTS_T, one_not, [[-1, -1, -1], [8, -1, -1], [-1, -1, -1]]),
            _random_sample(torch.tensor([2, -1, 1], dtype=torch.int32), none, [[2, 7, -1], [8, -1, -1], [2, -1, -1]]),
        ],
        "sample_recovered_tokens_kernel": [_recovery()],
    }


def _expansion(input_N: Tensor, expected: list[float], old: int, new: int) -> _Probe:
    inputs = {
        "output_ptr": torch.full((3,), -1, dtype=input_N.dtype),
        "input_ptr": input_N,
        "cu_num_tokens_ptr": _ENDS_N,
        "replace_from": old,
        "replace_to": new,
        "MAX_NUM_TOKENS": 4,
    }
    return _Probe(inputs, "output_ptr", torch.tensor(expected, dtype=input_N.dtype).tolist())


def _steps(drafts_T: Tensor) -> dict[str, Any]:
    return {
        "output_token_ids_ptr": torch.full((3, 3), -1, dtype=torch.int32),
        "cu_num_draft_tokens_ptr": _ENDS_N,
        "draft_token_ids_ptr": drafts_T,
        "bonus_token_ids_ptr": torch.tensor([[7], [8], [9]]),
        "max_spec_len": 2,
        "SYNTHETIC_MODE": False,
        "synthetic_conditional_rates_ptr": None,
    }


def _greedy(greedy_N: Tensor | None, expected: list[list[int]]) -> _Probe:
    inputs = {"target_argmax_ptr": torch.tensor([2, 0, 3]), "is_greedy_ptr": greedy_N, "uniform_probs_ptr": None}
    return _Probe(_steps(_DRAFTS_T) | inputs, "output_token_ids_ptr", expected)


def _random_sample(drafts_T: Tensor, greedy_N: Tensor, expected: list[list[int]]) -> _Probe:
    inputs = {
        "draft_probs_ptr": None,
        "target_probs_ptr": _TARGET_TV,
        "recovered_token_ids_ptr": torch.tensor([1, 2, 2], dtype=torch.int32),
        "uniform_probs_ptr": torch.tensor([0.5, 0.05, 0.5], dtype=torch.float64),
        "is_greedy_ptr": greedy_N,
        "vocab_size": 4,
        "NO_DRAFT_PROBS": True,
    }
    return _Probe(_steps(drafts_T) | inputs, "output_token_ids_ptr", expected)


def _recovery() -> _Probe:
    inputs = {
        "output_token_ids_ptr": torch.full((3,), -1, dtype=torch.int32),
        "cu_num_draft_tokens_ptr": _ENDS_N,
        "draft_token_ids_ptr": _DRAFTS_T,
        "draft_probs_ptr": None,
        "target_probs_ptr": _TARGET_TV,
        "inv_q_ptr": torch.tensor([[1.0, 1, 1, 1], [9, 9, 9, 9], [1, 1, 5, 1]]),
        "vocab_size": 4,
        "BLOCK_SIZE": 8192,
        "NO_DRAFT_PROBS": True,
        "USE_FP64_GUMBEL": False,
    }
    return _Probe(inputs, "output_token_ids_ptr", [1, 2, 2])


def mend_seeds() -> bool:
    """Let a seeded request whose prompt comes in pieces run on a CPU; say whether that was needed.

    A piece that is not the prompt's last samples a token, which vLLM drops, and turns the request's random numbers back
    by an offset. Those of a CPU have none: the engine dies of it. They start from the seed again instead.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    dies = getattr(CPUModelRunner, "_bookkeeping_sync", None)
    if dies is None or "set_offset" not in dies.__code__.co_names:
        return False

    def bookkeeping(runner: Any, *args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        generators, batch.generators = batch.generators, {}
        for index in runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist():
            generator = generators.get(index)
            # one that was preempted has sampled before, and goes on where it was
            if generator is not None and not runner.requests[batch.req_ids[index]].output_token_ids:
                generator.manual_seed(generator.initial_seed())
        try:
            return dies(runner, *args, **kwargs)
        finally:
            batch.generators = generators

    CPUModelRunner._bookkeeping_sync = bookkeeping
    log.warning("vLLM's CPU runner dies of a seeded request whose prompt comes in pieces: raymem has mended it")
    return True
