def test_the_only_shard_of_a_folder_is_listed_and_can_not_be_emptied(raymem, alice):
    raymem("bank", "pin", alice)
    (shard,) = raymem("shard", "list", "--json").json
    assert (shard["node"], shard["banks"], shard["memory_bytes"], shard["draining"]) == ("local", 0, None, False)

    said = raymem("shard", "list")
    assert said.code == 0
    assert "local" in said.out
    refused = raymem("shard", "drain", "local")
    assert refused.code == 1
    assert "no other can take its banks" in refused.err
    assert raymem("shard", "drain", "moon").code == 1
    assert "takes banks again" in raymem("shard", "drain", "local", "--undo").out
