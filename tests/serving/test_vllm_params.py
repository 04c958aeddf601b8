"""What users hand to vLLM: checked here, before an engine starts."""

import pytest

from raymem.errors import ConfigError, InvalidInput, InvalidName
from raymem.serving.vllm import ConnectorConfig, engine_args, raymem_params
from raymem.serving.vllm.params import Target, banks_to_read, write_target


def test_engine_args_name_the_method_the_layers_and_the_store():
    args = engine_args("./memory", layers=(15, 26), queue_bytes=1000)
    method = args["speculative_config"]
    assert method["method"] == "extract_hidden_states"
    assert method["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"] == [15, 26]
    extra = args["kv_transfer_config"]["kv_connector_extra_config"]
    assert ConnectorConfig.parse(extra).store == "./memory"
    assert ConnectorConfig.parse(extra).queue_bytes == 1000


@pytest.mark.parametrize("layers", [(), (26, 15), (26, 26), (0,)])
def test_layers_that_vllm_would_reorder_are_refused(layers):
    with pytest.raises(ConfigError, match=r"ascending"):
        engine_args("./memory", layers=layers)


def test_an_unknown_setting_is_an_error_that_names_it_and_the_known_ones():
    with pytest.raises(ConfigError, match=r"queue_size=3.*queue_bytes"):
        engine_args("./memory", queue_size=3)


def test_request_params_say_where_rows_go_and_which_banks_are_read():
    extra = raymem_params("lab/alice", "alice", read=["team/all"])
    assert write_target(extra["kv_transfer_params"]) == Target("lab/alice", "alice")
    assert banks_to_read(extra) == ("team/all",)
    assert raymem_params("lab/alice")["kv_transfer_params"]["raymem"]["stream"] == "lab/alice"
    assert raymem_params() == {}


def test_other_connectors_params_are_left_alone():
    assert write_target(None) is None
    assert write_target({"do_remote_decode": True}) is None
    assert banks_to_read({"raymem": "nonsense"}) == ()


@pytest.mark.parametrize("asked", ["lab/alice", {"bank": 3}, {"bank": "lab/alice", "steam": "a"}, {"stream": "a"}])
def test_a_wish_that_is_not_understood_is_refused_with_its_value(asked):
    with pytest.raises(InvalidInput, match="expected"):
        write_target({"raymem": asked})


def test_a_bad_bank_name_is_refused_before_it_reaches_the_engine():
    with pytest.raises(InvalidName, match="alice"):
        raymem_params("alice")
