"""A model on Ray Serve LLM whose OpenAI routes take the `memory` field.

    raymem calibrate && raymem bank create team/notes --kind spalm
    serve run --app-dir examples ray_serve_llm:app

and then the same client as for vLLM's own server, examples/vllm_openai_client.py.
"""

import os

from ray.serve.llm import LLMConfig, build_openai_app

from raymem.lm.models import model_path
from raymem.serving.vllm import engine_args
from raymem.serving.vllm.ray_serve import MemoryServer

MODEL = "smollm2-135m"
# every replica writes to the store, so that on several machines it is one that all of them reach
STORE = os.path.abspath(os.environ.get("RAYMEM_STORE", "memory"))
BANKS = ("team/*",)

config = LLMConfig(
    model_loading_config={"model_id": MODEL, "model_source": str(model_path(MODEL))},
    server_cls=MemoryServer,
    engine_kwargs={
        **engine_args(STORE, (26,), write_banks=BANKS, read_banks=BANKS, attend_banks=BANKS),
        "max_model_len": 1024,
        # on one CPU; with GPUs leave the executor and the bundles out, and name an accelerator_type
        "distributed_executor_backend": "mp",
    },
    placement_group_config={"bundles": [{"CPU": 1}]},
    deployment_config={"num_replicas": 1},
)
app = build_openai_app({"llm_configs": [config]})
