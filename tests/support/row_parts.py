"""Parts of a server that attends to rows, without an engine."""

from types import SimpleNamespace

import torch

from raymem.serving.vllm.attend import Attender
from raymem.serving.vllm.orders import Order, ranges
from raymem.serving.vllm.params import ConnectorConfig, raymem_params
from raymem.serving.vllm.row_index import RowIndex
from raymem.serving.vllm.vllm_internals import AttentionGroup

BLOCK, LONGEST, SECRET = 4, 64, "engine"
LAYERS, HEADS, WIDTH = 2, 1, 4


class Scheduler:
    """Admits requests, gives them blocks, and says what was scheduled."""

    def __init__(self, budget=10**6, refusal=None, scores=True, floor=0.0):
        self.index = RowIndex(budget, 10, floor=floor, ignored={0})
        config = ConnectorConfig(store="x", attend_banks=("lab/*",))
        group = refusal or AttentionGroup(0, BLOCK, 10, ())
        self.attender = Attender(
            config, self.index, group, longest=LONGEST, secret=SECRET, scores=scores, follow=lambda: None
        )
        self.blocks = 0
        self.requests = 0

    def request(self, tokens, params=None, **fields):
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        self.requests += 1
        hasher = get_request_block_hasher(BLOCK, sha256)
        sampling = SamplingParams(**{"max_tokens": 6} | fields, extra_args=params)
        return Request(f"r{self.requests}", list(tokens), sampling, None, block_hasher=hasher)

    def admit(self, tokens, params=None, **fields):
        request = self.request(tokens, params, **fields)
        return request, self.attender.admit(request)

    def begin(self, request, hit=0):
        """Give a request its blocks, as many as its tokens take, after so many that the prefix cache had."""
        claimed = self.attender.claimed(request, hit)
        count = -(-request.num_tokens // BLOCK)
        table = list(range(self.blocks, self.blocks + count))
        self.blocks += count
        self.attender.allocated(request, (table,), claimed or 0)
        return table

    def step(self, *running, new=()):
        """One step: `new` are requests with their tables, `running` those that decode a token."""
        fresh = [SimpleNamespace(req_id=r.request_id, block_ids=(table,), num_computed_tokens=0) for r, table in new]
        cached = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
        counts = {r.request_id: r.num_tokens for r, _ in new} | {r.request_id: 1 for r in running}
        return self.attender.step(
            SimpleNamespace(scheduled_new_reqs=fresh, scheduled_cached_reqs=cached, num_scheduled_tokens=counts)
        )

    def attach(self, bank, pos, tokens, *, at=None, **fields):
        """Carry out an order to keep rows; return the step that computes them."""
        at = range(len(tokens)) if at is None else at
        order = Order(do="capture", bank=bank, pos=ranges(pos), at=ranges(at), **{"kind": "spalm"} | fields)
        request, _ = self.admit(tokens, {"kv_transfer_params": order.signed(tokens, SECRET)})
        done = self.step(new=[(request, self.begin(request))])
        return done, self.attender.finish(request)["raymem"]


def asks(*banks, **options):
    return raymem_params(attend=banks, **options)


class Cache:
    """The paged cache of a worker as a dictionary of slots."""

    def __init__(self):
        self.rows = {}
        self.wanted = None

    def write(self, keys_LNHd, values_LNHd, slots_N):
        for place, slot in enumerate(slots_N.tolist()):
            self.rows[slot] = keys_LNHd[:, place], values_LNHd[:, place]

    def own_share(self, rows_LNHd):
        return rows_LNHd

    def require_whole(self):
        pass

    def zeros(self, rows):
        return torch.zeros(LAYERS, rows, HEADS, WIDTH)

    def watch(self, slots_N):
        self.wanted = slots_N

    def seen(self):
        found = [self.rows[slot] for slot in self.wanted.tolist()]
        return torch.stack([keys for keys, _ in found], 1), torch.stack([values for _, values in found], 1)
