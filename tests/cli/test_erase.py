import pytest


def test_rows_are_erased_and_the_receipt_kept(raymem, alice):
    made = raymem("bank", "erase", alice, "--stream", "s", "--run", "r", "--seq-from", 3, "--seq-to", 5, "-y", "--json")

    assert (made.json["rows"], made.json["status"]) == (2, "complete")
    assert raymem("bank", "show", alice, "--json").json["rows"] == 8
    assert raymem("bank", "receipts", alice, "--json").json == [made.json]
    assert "complete" in raymem("bank", "receipts", alice).out


def test_what_followed_rows_goes_with_them_where_that_is_asked_for(raymem, alice):
    rows = ("bank", "erase", alice, "--stream", "s", "--run", "r", "--seq-from", 3, "--seq-to", 5)

    kept = raymem(*rows, "-y")
    run = raymem(*rows, "-y", "--scope", "run", "--json")

    assert "later rows with traces" in kept.out
    assert "5 of --stream s --run r --seq-from 3" in kept.out
    assert "5 later rows were computed" in " ".join(kept.out.split())
    assert (run.json["rows"], run.json["followed_rows"], run.json["exposed_rows"]) == (5, 5, 0)
    assert raymem(*rows, "-y", "--scope", "all").code == 2


def test_names_leave_the_receipts(raymem, alice):
    raymem("bank", "erase", alice, "--stream", "s", "--run", "r", "--seq-from", 3, "--seq-to", 5, "-y")

    forgot = raymem("bank", "receipts", alice, "--forget-names", "--json").json

    assert forgot[0]["what"]["stream"].startswith("scrypt:")
    assert raymem("bank", "receipts", alice, "--stream", "s", "--json").json == forgot
    assert raymem("bank", "receipts", alice, "--stream", "t", "--json").json == []


def test_rows_may_expire(raymem, alice):
    assert raymem("bank", "ttl", alice, "86400", "--json").json["ttl_s"] == 86400
    assert "for good" in raymem("bank", "ttl", alice, "none").out
    assert raymem("bank", "ttl", alice, "soon").code == 2


def test_a_sweep_says_what_it_would_delete(raymem, alice, store):
    ghost = store / f"journal-{'0' * 32}.lance" / "data"
    ghost.mkdir(parents=True)
    (ghost / "late.lance").write_bytes(b"rows")

    assert raymem("store", "sweep", "--dry-run", "--json").json["young"] == [f"journal-{'0' * 32}"]
    assert "1 are too young" in raymem("store", "sweep").out


@pytest.mark.parametrize("options", [[], ["--run", "r"], ["--stream", "s", "--seq-from", "1"]])
def test_an_erasure_that_names_nothing_is_one_red_line(raymem, alice, options):
    said = raymem("bank", "erase", alice, "--yes", *options)

    assert said.code == 1
    assert "name" in said.err
