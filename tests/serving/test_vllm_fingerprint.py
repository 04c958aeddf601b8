"""An engine's fingerprint is its model's, and what its arguments change in the model changes it."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from modelzoo import save_tiny

from raymem.errors import ConfigError, FingerprintMismatch
from raymem.lm.attending import rebuild
from raymem.lm.fingerprint import fingerprint_of
from raymem.lm.models import LanguageModel
from raymem.lm.rebuilding import rope_name
from raymem.rows import AttendedRows

LAYERS = (1, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("engine") / "tiny", head_dim=32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "cache"))


def configured(folder, **changes):
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model=str(folder), dtype="bfloat16", max_model_len=64, enforce_eager=True, **changes)
    return args.create_engine_config()


def engine(folder, **changes):
    from raymem.serving.vllm.vllm_internals import engine_fingerprint

    return engine_fingerprint(configured(folder, **changes), LAYERS)


def test_an_engine_and_the_models_folder_have_one_fingerprint(folder):
    bank = fingerprint_of(str(folder), LAYERS, "calibration")
    bank.accept(engine(folder))
    bank.accept(engine(folder, hf_overrides={"architectures": ["LlamaForCausalLM"], "use_cache": False}))
    with pytest.raises(FingerprintMismatch, match="layers"):
        fingerprint_of(str(folder), (3, 1)).accept(engine(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"hf_overrides": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
        {"hf_overrides": {"rms_norm_eps": 0.01}},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"load_format": "dummy"},
    ],
    ids=str,
)
def test_what_an_engine_changes_in_its_model_is_another_model(folder, changes):
    with pytest.raises(FingerprintMismatch, match="content"):
        fingerprint_of(str(folder), LAYERS).accept(engine(folder, **changes))


def test_a_change_without_a_name_is_refused(folder):
    with pytest.raises(ConfigError, match="hf_overrides"):
        engine(folder, hf_overrides=lambda config: config)


def test_another_tokenizer_is_another_fingerprint(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    fingerprint_of(str(folder), LAYERS).accept(engine(folder, tokenizer=str(other)))
    said = (other / "tokenizer.json").read_text().replace('"normalizer": null', '"normalizer": {"type": "Lowercase"}')
    (other / "tokenizer.json").write_text(said)
    with pytest.raises(FingerprintMismatch, match="tokenizer"):
        fingerprint_of(str(folder), LAYERS).accept(engine(folder, tokenizer=str(other)))


def test_a_request_with_an_adapter_does_not_stream_and_is_counted():
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

    from raymem.serving.vllm.connector import RaymemConnector
    from raymem.serving.vllm.params import ConnectorConfig, raymem_params

    class Scheduler(RaymemConnector):
        """The scheduler's half, without an engine around it."""

        def __init__(self):
            self.config = ConnectorConfig(store="unused", write_banks=["lab/*"])
            self.layers = (26,)
            self._refused = []
            self._attender = SimpleNamespace(admit=lambda _request: 0)
            self._tracker = self
            self.admitted = []

        def admit(self, request, target, before):
            self.admitted.append(request.request_id)

    scheduler = Scheduler()
    params = SamplingParams(extra_args=raymem_params(bank="lab/a"))
    for name, adapter in (("plain", None), ("adapted", LoRARequest("poet", 1, "/adapters/poet"))):
        scheduler.on_new_request(Request(name, [1, 2, 3], params, None, lora_request=adapter))
    ((refused, error),) = scheduler._refused
    assert (scheduler.admitted, refused) == (["plain"], "adapted")
    assert "'poet'" in str(error)


def test_an_engine_and_the_model_itself_make_rows_of_one_format(folder):
    from raymem.serving.vllm.vllm_internals import row_format

    model = LanguageModel.load(str(folder), torch.bfloat16)
    keys_LTHd, values_LTHd = rebuild(model, torch.arange(5))
    rows = AttendedRows("s", "r", 0, keys_LTHd, values_LTHd, rope=rope_name(model.rope))
    assert row_format(configured(folder)) == rows.format._replace(dtype="bfloat16")
