"""The reservoir by which memories without rows know what they are about."""

import torch
from torch.nn.functional import normalize

from raymem.memory.key_reservoir import SCOPE_ROWS, hash62, sample, similarity


def filled(count, calls=1, banks=1, slots=SCOPE_ROWS):
    # keys of width 2 whose angle names the row
    angle = torch.arange(count) * (3.0 / count)
    keys = torch.stack([angle.cos(), angle.sin()], 1)[None].expand(banks, -1, -1)
    kept, scale = torch.zeros(banks, slots, 2, dtype=torch.int8), torch.zeros(banks, slots)
    seen = 0
    for part in keys.chunk(calls, dim=1):
        size = part.shape[1]
        kept, scale = sample(kept, scale, part, torch.full((banks,), seen), torch.full((banks,), size))
        seen += size
    return kept, scale


def test_every_row_is_as_likely_to_stay_whenever_it_came():
    kept, scale = filled(5000)
    unit = kept.float() * scale[..., None]
    when = torch.atan2(unit[0, :, 1], unit[0, :, 0]) / 3.0
    # 256 uniform draws: the mean lies within four standard errors of a half, the quarters hold a quarter each
    assert abs(float(when.mean()) - 0.5) < 4 * (1 / 12 / 256) ** 0.5
    assert bool(((torch.histc(when, 4, 0, 1) / 256 - 0.25).abs() < 0.11).all())


def test_it_does_not_depend_on_how_the_rows_were_cut():
    for calls in (1, 7, 600):
        got = filled(600, calls)
        assert torch.equal(got[0], filled(600)[0])
        assert torch.equal(got[1], filled(600)[1])


def test_until_it_is_full_it_holds_every_row():
    _, scale = filled(200)
    assert int((scale > 0).sum()) == 200


def test_similarity_is_the_best_cosine_and_minus_one_when_empty():
    kept, scale = torch.zeros(2, 4, 3, dtype=torch.int8), torch.zeros(2, 4)
    queries = normalize(torch.tensor([[[1.0, 1, 0], [0, 0, 1]]]), dim=-1).expand(2, -1, -1)
    assert similarity(kept, scale, queries).tolist() == [[-1, -1], [-1, -1]]
    keys = torch.eye(3)[None, :2].expand(2, -1, -1)
    kept, scale = sample(kept, scale, keys, torch.zeros(2).long(), torch.tensor([2, 0]))
    got = similarity(kept, scale, queries)
    torch.testing.assert_close(got[0], torch.tensor([2**-0.5, 0.0]))
    assert got[1].tolist() == [-1, -1]


def test_the_hash_is_splitmix64():
    # first outputs of the published generator from the same counters, computed with Python's integers
    def reference(n):
        mask = 2**64 - 1
        x = (n + 0x5C09E) * 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return (x ^ x >> 31) & 2**62 - 1

    numbers = [0, 1, 2, 12345, 2**40]
    assert hash62(torch.tensor(numbers)).tolist() == [reference(n) for n in numbers]
