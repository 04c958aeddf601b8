"""The gateway as a Ray Serve deployment, on a cluster of this test alone."""

import pytest

from raymem import Settings, connect
from raymem.config import GatewaySettings
from raymem.errors import ConfigError, Unauthorized

KEY = "key"


def test_arguments_of_serve_run_are_checked():
    from raymem.serving.deploy import app

    with pytest.raises(ConfigError, match="colour"):
        app({"colour": "red"})
    with pytest.raises(ConfigError, match="many"):
        app({"replicas": "many"})


@pytest.mark.ray
def test_the_deployment_answers_with_the_clusters_banks(tmp_path, free_port, tiny, gateway_spec, make_rows):
    import ray
    from ray import serve

    from raymem.serving.deploy import deployment

    settings = Settings(gateway=GatewaySettings(api_keys=(KEY,)))
    # a cluster of its own, whatever else runs on this machine
    ray.init(address="local", num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": free_port})
        serve.run(deployment(settings, cold=str(tmp_path / "memory")), name="raymem", route_prefix="/")
        url = f"http://127.0.0.1:{free_port}"
        with connect(url, api_key=KEY) as store:
            store.put_calibration(tiny.calibration)
            bank = store.create("lab/alice", gateway_spec)
            trace = make_rows(20)
            assert bank.write(trace).durable
            assert bank.read(trace.hidden[5:6], k=1, start=5).rows(0)[0].seq == 5
            before = bank.digest()
            # a store of this process over the same shards sees the same bank
            with connect("ray") as beside:
                assert beside.bank("lab/alice").digest() == before
                assert beside.stats()["backend"] == store.stats()["backend"] == "ray"
        with connect(url) as stranger, pytest.raises(Unauthorized):
            stranger.banks()
    finally:
        serve.shutdown()
        ray.shutdown()
