import pickle
from dataclasses import replace

import pytest
import torch

from raymem import Readout, Trace
from raymem.actors.transfer import pack, pack_fields, unpack, unpack_fields

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 2, 3), (1,), (0, 2, 3), (5, 0)], ids=str)
def test_a_tensor_arrives_bit_by_bit(dtype, shape):
    sent = torch.randn(shape).to(dtype)

    got = unpack(pickle.loads(pickle.dumps(pack(sent))))  # noqa: S301 - what Ray does between processes

    assert got.dtype == dtype
    assert got.shape == shape
    assert torch.equal(got, sent)


def test_a_view_arrives_as_what_it_shows():
    sent = torch.arange(24).reshape(4, 6).T[1:]

    assert torch.equal(unpack(pack(sent)), sent)


def test_read_only_bytes_become_a_tensor_that_can_be_written():
    packed = pack(torch.ones(3))
    packed.data.flags.writeable = False

    unpack(packed).add_(1)

    assert torch.equal(unpack(packed), torch.ones(3))


def test_traces_and_readouts_arrive_whole(tiny):
    trace = replace(tiny.trace(5, stream="other", seq=3), fingerprint=tiny.fingerprint)
    readout = Readout(torch.zeros(5, 0), torch.ones(5), torch.ones(5, 2, dtype=torch.int64), sources=(("s", "r"),))

    got_trace = unpack_fields(Trace, pack_fields(trace))
    got_readout = unpack_fields(Readout, pack_fields(readout))

    assert torch.equal(got_trace.hidden, trace.hidden)
    assert torch.equal(got_trace.tokens, trace.tokens)
    assert (got_trace.stream, got_trace.run, got_trace.seq, got_trace.time) == ("other", "r", 3, 1.0)
    assert got_trace.fingerprint == tiny.fingerprint
    assert got_trace.values is None
    assert got_readout.values_QV.shape == (5, 0)
    assert got_readout.scores_Qk is None
    assert got_readout.sources == (("s", "r"),)
