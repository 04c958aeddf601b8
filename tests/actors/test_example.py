import runpy
from contextlib import nullcontext

import pytest


@pytest.mark.ray
def test_the_bank_of_the_ray_example_moves_and_survives(nodes, root, monkeypatch, capsys):
    # it runs as it stands, on the nodes that run already
    monkeypatch.setattr("raymem.actors.cluster.local_nodes", lambda n: nullcontext(nodes))
    runpy.run_path(str(root / "examples" / "on_ray.py"), run_name="__main__")
    printed = capsys.readouterr().out

    assert printed.count("same bytes: True") == 2
    assert "killed and back: 31 rows were there already" in printed
