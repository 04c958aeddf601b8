"""What users hand to vLLM: checked here, before an engine starts."""

import json

import pytest

from raymem.errors import ConfigError, InvalidInput, InvalidName, Unauthorized
from raymem.serving.vllm import ConnectorConfig, engine_args, raymem_params
from raymem.serving.vllm.params import Attending, Target, banks_to_attend, banks_to_read, write_target


def asks(wish):
    return {"kv_transfer_params": {"raymem": wish}}


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
    assert banks_to_read({"kv_transfer_params": {"do_remote_decode": True}}) == ()


@pytest.mark.parametrize("asked", ["lab/alice", {"bank": 3}, {"bank": "lab/alice", "steam": "a"}, {"stream": "a"}])
def test_a_wish_that_is_not_understood_is_refused_with_its_value(asked):
    with pytest.raises(InvalidInput, match="expected"):
        write_target({"raymem": asked})


def test_a_bad_bank_name_is_refused_before_it_reaches_the_engine():
    with pytest.raises(InvalidName, match="alice"):
        raymem_params("alice")


def test_banks_to_read_are_named_once_each_in_order():
    many = ["lab/b", "lab/a"] * 10_000
    assert banks_to_read(asks({"read": many})) == ("lab/b", "lab/a")
    assert raymem_params(read=many) == asks({"read": ["lab/b", "lab/a"]})


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"read": [f"lab/{i}" for i in range(9)]}, "9 banks to read; a request reads 8 at most"),
        ({"read": "lab/alice"}, "'lab/alice'; expected a list of names"),
        ({"read": 3}, "expected a list"),
        ({"read": None}, "expected a list"),
        ({"read": {"lab/alice": 1}}, "expected a list"),
        ({"read": ["lab/alice", 3]}, "expected a list"),
        ({"read": [["lab/alice"]]}, "expected a list"),
        ({"read": ["no slash"]}, "namespace/name"),
        ({"read": ["lab/" + "x" * 10**6]}, r"… \(1000004 characters\)"),
        ({"reed": ["lab/alice"]}, r'expected \{"bank"'),
    ],
)
def test_a_wish_to_read_that_cannot_be_followed_is_refused_with_its_value_in_short(asked, reason):
    with pytest.raises(InvalidInput, match=reason) as refused:
        banks_to_read(asks(asked))
    assert len(str(refused.value)) < 400
    if asked.get("read"):
        with pytest.raises(InvalidInput, match=reason):
            raymem_params(read=asked["read"])


@pytest.mark.parametrize(
    "asked", [{"bank": "x" * 10**6}, {"bank": ["x"] * 10**6}, {"bank": "lab/a", "stream": ["x"] * 10**6}]
)
def test_a_wish_to_write_is_shortened_in_the_error(asked):
    with pytest.raises(InvalidInput) as refused:
        write_target({"raymem": asked})
    assert len(str(refused.value)) < 400


def test_settings_name_no_bank_unless_asked_and_a_program_of_its_own_may_touch_all():
    flags = ConnectorConfig.parse({"store": "./memory"})
    for check in (flags.check_write, lambda bank: flags.check_reads((bank,)), lambda b: flags.check_attends((b,))):
        with pytest.raises(Unauthorized, match=r"'lab/alice' is not among.*_banks, \[\].*kv_connector_extra_config"):
            check("lab/alice")
    own = ConnectorConfig.parse(engine_args("./memory")["kv_transfer_config"]["kv_connector_extra_config"])
    own.check_write("lab/alice")
    own.check_reads(["lab/alice", "other/bob"])
    own.check_attends(["lab/alice", "other/bob"])


@pytest.mark.parametrize(
    ("glob", "allowed", "refused"),
    [
        ("lab/*", "lab/alice", "laboratory/alice"),
        ("lab/alice", "lab/alice", "lab/alice2"),
        ("*/public", "lab/public", "lab/public-not"),
        ("lab/[ab]*", "lab/bob", "lab/carol"),
        ("Lab/*", "Lab/alice", "lab/alice"),
    ],
)
def test_globs_say_which_banks_requests_may_touch(glob, allowed, refused):
    config = ConnectorConfig(store="./memory", write_banks=(glob,), read_banks=("team/x", glob))
    config.check_write(allowed)
    config.check_reads([allowed, "team/x"])
    with pytest.raises(Unauthorized, match=refused):
        config.check_write(refused)
    with pytest.raises(Unauthorized, match=refused):
        config.check_reads([allowed, refused])


def test_a_request_says_what_it_attends_to_beside_what_it_writes_and_reads():
    extra = raymem_params("lab/a", read=["lab/b"], attend=["lab/c", "lab/d", "lab/c"], rows=256, refresh=32)
    asked = extra["kv_transfer_params"]
    assert banks_to_attend(asked) == Attending(("lab/c", "lab/d"), 256, 32, required=False)
    assert (write_target(asked), banks_to_read(extra)) == (Target("lab/a", "lab/a"), ("lab/b",))
    assert json.loads(json.dumps(extra)) == extra
    alone = raymem_params(attend=["lab/c"], required=True)["kv_transfer_params"]
    assert banks_to_attend(alone) == Attending(("lab/c",), required=True)
    assert write_target(alone) is None
    assert banks_to_attend(None) is banks_to_attend({"raymem": {"read": ["lab/b"]}}) is None


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ("lab/a", r"'lab/a'; expected \{\"banks\""),
        ({}, r"expected \{\"banks\""),
        ({"banks": []}, "is empty"),
        ({"banks": "lab/a"}, "expected a list"),
        ({"banks": ["lab"]}, "namespace/name"),
        ({"banks": [f"lab/{i}" for i in range(9)]}, "8 at most"),
        ({"banks": ["lab/a"], "rows": 0}, r'\["rows"\] is 0; expected a whole number from 1'),
        ({"banks": ["lab/a"], "rows": 2**21}, "2097152; expected"),
        ({"banks": ["lab/a"], "rows": True}, "True; expected"),
        ({"banks": ["lab/a"], "rows": "512"}, "'512'; expected"),
        ({"banks": ["lab/a"], "refresh": -1}, r'\["refresh"\] is -1'),
        ({"banks": ["lab/a"], "required": 1}, "expected true or false"),
        ({"banks": ["lab/a"], "row": 1}, r"expected \{"),
    ],
)
def test_a_wish_to_attend_that_cannot_be_followed_is_refused_with_its_value(wish, reason):
    with pytest.raises(InvalidInput, match=reason):
        banks_to_attend({"raymem": {"attend": wish}})


def test_an_engine_that_extracts_nothing_keeps_its_speculative_slot_and_compiles():
    args = engine_args("./memory", stream=False, rows_bytes=1000)
    assert not {"speculative_config", "enforce_eager"} & set(args)
    assert args["kv_transfer_config"]["kv_connector_extra_config"]["rows_bytes"] == 1000


@pytest.mark.parametrize("globs", ["lab/*", [3], [""], ["x" * 1000], None])
def test_globs_that_are_none_are_an_error_that_names_the_setting(globs):
    with pytest.raises(ConfigError, match="write_banks") as refused:
        engine_args("./memory", write_banks=globs)
    assert len(str(refused.value)) < 500
