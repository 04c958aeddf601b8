import torch

from raymem.encode import residual_values


def test_a_residual_is_one_hot_minus_prediction_through_the_embedding() -> None:
    logits_TV, embedding_VD = torch.randn(131, 37), torch.randn(37, 11)
    next_T = torch.randint(0, 37, (131,))
    one_hot_TV = torch.nn.functional.one_hot(next_T, 37).float()
    expected_TD = (one_hot_TV - logits_TV.softmax(-1)) @ embedding_VD
    torch.testing.assert_close(residual_values(logits_TV, next_T, embedding_VD), expected_TD)


def test_a_residual_moves_the_head_towards_the_token_that_came() -> None:
    embedding_VD, state_TD = torch.randn(37, 11), torch.randn(5, 11)
    next_T = torch.tensor([3, 0, 36, 7, 7])
    values_TD = residual_values(state_TD @ embedding_VD.T, next_T, embedding_VD)

    def loss(states_TD: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(states_TD @ embedding_VD.T, next_T)

    assert loss(state_TD + 0.05 * values_TD) < loss(state_TD)


def test_a_token_not_known_yet_gives_zeros_and_low_precision_gives_float32() -> None:
    logits_TV, embedding_VD = torch.randn(3, 7).bfloat16(), torch.randn(7, 5).bfloat16()
    values_TD = residual_values(logits_TV, torch.tensor([1, -1, 2]), embedding_VD)
    assert values_TD.dtype == torch.float32
    assert values_TD.any(1).tolist() == [True, False, True]


def test_no_rows_give_no_values() -> None:
    empty_T = torch.zeros(0, dtype=torch.int64)
    assert residual_values(torch.zeros(0, 7), empty_T, torch.randn(7, 5)).shape == (0, 5)
