import torch

from raymem import Trace, connect


def test_train_keeps_weights_and_makes_the_bank_that_uses_them(raymem, store, model):
    made = raymem("bank", "create", "lab/a", "--kind", "compressive", "--model", model, "--layers", "3,5")
    assert made.code == 0, made.err
    with connect(store) as opened:
        hidden = (torch.randn(900, 2, 24) + 0.5).bfloat16()
        opened.bank("lab/a").write(Trace(hidden, torch.randint(50, (900,)), "s", "r"))
    said = raymem("train", "compressive", "--bank", "lab/a", "--steps", "3", "--into", "lab/b", "--json")
    assert said.code == 0, said.err
    found = said.json
    assert found["params"].startswith("sha256:")
    assert found["figures"].keys() == {"trained", "mean", "max", "subsample"}
    shown = raymem("bank", "show", "lab/b", "--json").json
    assert shown["spec"]["params"] == found["params"]
    assert shown["spec"]["options"]["compressor"] == "conv"
    again = raymem("train", "compressive", "--bank", "lab/a", "--steps", "3")
    assert found["params"] in again.out.replace("\n", "")
    option = ["--option", "compressor=conv", "--params", found["params"]]
    assert raymem("bank", "create", "lab/c", "--kind", "compressive", *named(model), *option).code == 0


def named(model):
    return ["--model", model, "--layers", "3,5"]


def test_train_says_what_is_wrong_and_what_to_do(raymem, alice):
    few = raymem("train", "spalm", "--bank", alice)
    assert few.code == 1
    assert "needs 640: write more text" in few.err.replace("\n", " ")
    wrong = raymem("train", "dct", "--bank", alice, "--json")
    assert wrong.code == 1
    assert "is of kind 'spalm'" in wrong.json["error"]["message"]
    behind = raymem("train", "dct", "--bank", alice, "--store", "http://127.0.0.1:1")
    assert "run it where the cold store is" in behind.err.replace("\n", " ")
    assert "rate" in raymem("train", "dct", "--bank", alice, "--rate", "-1").err
