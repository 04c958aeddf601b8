"""vLLM beside raymem: hidden states out of a running engine, memory into its logits.

Nothing here imports vLLM until an engine does: `engine_args` and `raymem_params` are plain data.
"""

from raymem.serving.vllm.params import ConnectorConfig, engine_args, raymem_params

__all__ = ["ConnectorConfig", "engine_args", "raymem_params"]
