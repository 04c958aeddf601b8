"""vLLM's `vllm.general_plugins` entry point: makes the connector known by name in every process of an engine."""

from __future__ import annotations

from raymem.serving.vllm.params import CONNECTOR, CONNECTOR_MODULE


def register() -> None:
    """Register RaymemConnector with vLLM; vLLM calls this several times, in every process."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, CONNECTOR)
    except ValueError:
        # the factory refuses a second registration under the same name: ours is there already
        KVConnectorFactory.get_connector_class_by_name(CONNECTOR)
