"""Ray Serve LLM with memory: the server class of an `LLMConfig`.

Ray's ingress parses OpenAI requests and calls the handlers of vLLM in a replica, not vLLM's routes, so that no endpoint
plugin is loaded there. This class gives those handlers the `memory` field.
"""

from __future__ import annotations

from ray.serve.llm import LLMServer

from raymem.errors import Unsupported
from raymem.serving.vllm.endpoint import install


class MemoryServer(LLMServer):
    """Serves a model whose chat and completions take the `memory` field.

    ::

        LLMConfig(server_cls=MemoryServer, engine_kwargs=engine_args("s3://bucket/memory"), ...)
    """

    async def start(self) -> None:
        """Start the engine, then let its handlers take the field.

        Raises:
            ConfigError: the engine runs without RaymemConnector. Unsupported: this Ray keeps vLLM elsewhere.
        """
        await super().start()
        try:
            engine, state = self.engine._engine_client, self.engine._app_state
        except AttributeError as error:
            raise Unsupported(f"this Ray's vLLM engine is not one that raymem knows: {error}") from error
        install(engine, state)
