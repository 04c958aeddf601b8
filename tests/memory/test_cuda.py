"""Every kind on a GPU: the answers of the CPU up to rounding, states that move between the two."""

import pytest
import torch
from torch.nn.functional import pad

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

from raymem.memory.base import EncodedRows, Memory  # noqa: E402


def moved(rows: EncodedRows) -> EncodedRows:
    return EncodedRows(*(None if part is None else part.cuda() for part in vars(rows).values()))


def on_gpu(case) -> Memory:
    # as a runtime does it: built on the CPU, then moved
    return case.build().cuda()


def test_a_bank_on_a_gpu_answers_as_one_on_the_cpu(case):
    memory, plain = on_gpu(case), case.build()
    expected = plain.lookup(plain.absorb(plain.empty(), case.rows(301)), case.rows(9, 295).keys_NK, 7)
    rows, asked = moved(case.rows(301)), case.rows(9, 295).keys_NK.cuda()
    with torch.device("cuda"):
        found = memory.lookup(memory.absorb(memory.empty(), rows), asked, 7)
    for name, tensor in vars(expected).items():
        got = getattr(found, name)
        assert (got is None) == (tensor is None), name
        if tensor is not None and tensor.is_floating_point():
            # a few hundred float32 updates whose products are summed in another order
            torch.testing.assert_close(got.cpu(), tensor, rtol=1e-3, atol=1e-4)
    # candidates whose scores are nearly equal may come in another order
    gap_Qk = expected.scores_Qk.diff(dim=1).abs() > 1e-3
    alone_Qk = pad(gap_Qk, (1, 0), value=True) & pad(gap_Qk, (0, 1), value=False)
    assert torch.equal(found.tokens_Qk.cpu()[alone_Qk], expected.tokens_Qk[alone_Qk])


def test_a_state_moves_from_a_gpu_to_the_cpu_and_back(case):
    memory, plain = on_gpu(case), case.build()
    rows = moved(case.rows(90))
    with torch.device("cuda"):
        state = memory.absorb(memory.empty(), rows)
        dumped = memory.dump(state)
        again = memory.dump(memory.load({name: tensor.cuda() for name, tensor in dumped.items()}))
    here = plain.dump(plain.load({name: tensor.cpu() for name, tensor in dumped.items()}))
    for name, tensor in dumped.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.equal(tensor.cpu(), here[name]), name


def test_cutting_the_stream_elsewhere_gives_the_same_bits_on_a_gpu(case):
    memory = on_gpu(case)
    rows, borders = moved(case.rows(90)), ((0, 1), (1, 32), (32, 90))
    cut = [moved(case.rows(end - start, start)) for start, end in borders]
    with torch.device("cuda"):
        whole = memory.dump(memory.absorb(memory.empty(), rows))
        state = memory.empty()
        for part in cut:
            state = memory.absorb(state, part)
        parts = memory.dump(state)
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_an_empty_bank_on_a_gpu_answers_nothing(case):
    memory = on_gpu(case)
    asked = case.rows(3).keys_NK.cuda()
    with torch.device("cuda"):
        found = memory.lookup(memory.empty(), asked, 4)
    assert found.tokens_Qk.tolist() == [[-1] * 4] * 3
