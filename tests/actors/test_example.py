import pytest


@pytest.mark.ray
def test_the_bank_of_the_ray_example_moves_and_survives(run_example):
    printed = run_example("on_ray.py")

    assert printed.count("same bytes: True") == 2
    assert "killed and back: 31 rows were there already" in printed
