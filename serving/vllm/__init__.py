"""vLLM beside raymem: hidden states out of a running engine, memory into its logits.

Nothing here imports vLLM until an engine does: `engine_args` and `raymem_params` are plain data, and the others are
given an engine.
"""

from raymem.serving.vllm.attach import (
    AttachedRows,
    attach_rows,
    attach_rows_async,
    detach_rows,
    detach_rows_async,
    replace_rows,
    rows_kept,
)
from raymem.serving.vllm.params import ConnectorConfig, engine_args, raymem_params

__all__ = [
    "AttachedRows",
    "ConnectorConfig",
    "attach_rows",
    "attach_rows_async",
    "detach_rows",
    "detach_rows_async",
    "engine_args",
    "raymem_params",
    "replace_rows",
    "rows_kept",
]
