"""The retry budget."""

from gateway.policy.retry_budget import MIN_RETRIES, RetryBudget


def granted(budget: RetryBudget, tries: int) -> int:
    return sum(budget.grant() for _ in range(tries))


def test_a_few_are_always_allowed() -> None:
    budget = RetryBudget()
    budget.active = 1
    assert granted(budget, 10) == MIN_RETRIES
    assert (budget.retrying, budget.refused) == (MIN_RETRIES, 7)
    budget.release()
    assert granted(budget, 2) == 1


def test_under_load_a_fifth_of_it() -> None:
    budget = RetryBudget()
    budget.active = 100
    assert granted(budget, 100) == 20
