"""The kernels of vLLM's rejection sampler on a CPU, as vLLM has them and as raymem mends them, beside plain Python."""

import importlib

import pytest
import torch

from raymem.errors import Unsupported
from raymem.serving.vllm.cpu_sampling import mend_sampler, mend_seeds

pytestmark = pytest.mark.vllm

NAME = "vllm.v1.sample.rejection_sampler"


@pytest.fixture
def sampler():
    """The sampler with the kernels that vLLM itself puts in place on this machine."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM's CPU build alone replaces these kernels")
    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    yield importlib.import_module(NAME)
    current_platform.register_triton_kernel_overrides()


def expanded(values, ends, old, new):
    starts = [0, *ends]
    return [new if v == old else v for i, v in enumerate(values) for _ in range(ends[i] - starts[i])]


def test_temperatures_and_cutoffs_of_each_request_reach_all_its_drafts(sampler):
    ends = torch.tensor([1, 1, 3, 8], dtype=torch.int32)
    cases = [
        (torch.tensor([0.0, 1.5, 0.7, 0.3]), 0, 1),
        (torch.tensor([0.0, 1.5, 0.7, 0.3], dtype=torch.float64), 0, 1),
        (torch.tensor([0.9, 1.0, 0.1, 0.3]), 0, 0),
        (torch.tensor([40, 49152, 1, 7], dtype=torch.int32), 0, 0),
        (torch.tensor([40, 49152, 1, 7]), 1, 5),
    ]

    def wrong():
        found = [sampler.expand_batch_to_tokens(x, ends, 8, old, new).tolist() for x, old, new in cases]
        wanted = [expanded(x.tolist(), ends.tolist(), old, new) for x, old, new in cases]
        return [str(x.dtype) for (x, *_), f, w in zip(cases, found, wanted, strict=True) if f != w]

    # vLLM 0.32 fills a copy for all but int64
    assert wrong() == ["torch.float32", "torch.float64", "torch.float32", "torch.int32"]
    assert "expand_kernel" in mend_sampler()
    assert wrong() == []


def walked(drafts, ends, target, recovered, uniform, bonus, width):
    """The rule of arxiv.org/abs/2211.17192 with drafts of probability one, token by token."""
    rows, start = [], 0
    for i, end in enumerate(ends):
        row = []
        for t in range(start, end):
            kept = drafts[t] >= 0 and target[t][drafts[t]] >= uniform[t]
            row.append(drafts[t] if kept else recovered[t])
            if not kept:
                break
        else:
            row.append(bonus[i])
        rows.append(row + [-1] * (width - len(row)))
        start = end
    return rows


def one_step(sampler, generator, requests, vocabulary, padded):
    counts = torch.randint(0, 4, (requests,), generator=generator)
    counts[0] = 2
    ends, total = counts.cumsum(0).to(torch.int32), int(counts.sum())
    low = -1 if padded else 0
    drafts = torch.randint(low, vocabulary, (total,), generator=generator, dtype=torch.int32)
    target = torch.softmax(4 * torch.randn(total, vocabulary, generator=generator), 1)
    uniform = 0.1 * torch.rand(total, dtype=torch.float64, generator=generator)
    recovered = torch.randint(0, vocabulary, (total,), generator=generator, dtype=torch.int32)
    bonus = torch.randint(0, vocabulary, (requests, 1), generator=generator, dtype=torch.int32)
    width = int(counts.max()) + 1
    out = torch.full((requests, width), -1, dtype=torch.int32)
    greedy = torch.zeros(requests, dtype=torch.bool)
    sampler._rejection_random_sample(
        out, ends, drafts, None, target, bonus, recovered, uniform, greedy, width - 1, None
    )
    args = (drafts, ends, target, recovered, uniform, bonus[:, 0])
    return out.tolist(), walked(*(x.tolist() for x in args), width)


@pytest.mark.parametrize("padded", [False, True])
def test_drafts_are_accepted_by_the_rule_and_padding_never_is(sampler, padded):
    generator = torch.Generator().manual_seed(0)
    sizes = [(1 + i % 5, (2, 17, 500)[i % 3]) for i in range(200)]

    def differing():
        return sum(found != wanted for found, wanted in (one_step(sampler, generator, *s, padded) for s in sizes))

    # without drafts of -1, as structured output pads with, vLLM's own is right
    assert (differing() > 0) == padded
    assert "rejection_random_sample_kernel" in mend_sampler()
    assert differing() == 0


def test_what_is_right_is_left_alone(sampler):
    assert set(mend_sampler()) == {"expand_kernel", "rejection_random_sample_kernel"}
    mended = {name: value for name, value in vars(sampler).items() if name.endswith("_kernel")}
    assert mend_sampler() == []
    assert all(getattr(sampler, name) is value for name, value in mended.items())


def nothing(*_args):
    """A kernel that does nothing."""


def raising(*_args):
    raise TypeError("unexpected keyword argument")


@pytest.mark.parametrize("name", ["rejection_greedy_sample_kernel", "sample_recovered_tokens_kernel"])
@pytest.mark.parametrize("kernel", [nothing, raising])
def test_an_engine_with_a_wrong_kernel_that_cannot_be_replaced_is_refused(sampler, name, kernel):
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels({f"{NAME}.{name}": kernel})
    with pytest.raises(Unsupported, match=rf"garbage.*{name}.*0\.32"):
        mend_sampler()


def test_a_kernel_that_is_gone_is_refused_by_name(sampler):
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(sampler, "expand_kernel")
        with pytest.raises(Unsupported, match="expand_kernel"):
            mend_sampler()


def test_the_runners_way_back_is_mended_once(monkeypatch):
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    # so that the class is as it was when the test has ended
    monkeypatch.setattr(CPUModelRunner, "_bookkeeping_sync", CPUModelRunner._bookkeeping_sync)
    assert mend_seeds() is True
    assert mend_seeds() is False
