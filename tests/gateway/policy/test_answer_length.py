"""The likely length of an answer."""

from gateway.policy.answer_length import ANSWERS, ENOUGH, LEAST, MAX_CLIENTS, UNKNOWN, AnswerLengths


def test_nothing_seen() -> None:
    lengths = AnswerLengths()
    assert lengths.likely("m", "a", 32_000) == UNKNOWN
    assert lengths.likely("m", "a", 100) == 100


def test_few_answers_exceed_it() -> None:
    lengths = AnswerLengths()
    for tokens in [100] * 18 + [3000] * 2:
        lengths.note("m", "a", tokens)
    assert lengths.likely("m", "a", 32_000) == 3000, "one in ten is longer"
    for _ in range(ANSWERS):
        lengths.note("m", "a", 100)
    assert lengths.likely("m", "a", 32_000) == 100, "old ones are forgotten"
    assert lengths.likely("m", "a", 50) == 50, "it may not be longer than that"


def test_short_answers_are_not_taken_to_stay_short() -> None:
    lengths = AnswerLengths()
    for _ in range(ENOUGH):
        lengths.note("m", "a", 1)
    assert lengths.likely("m", "a", 1000) == LEAST


def test_a_client_of_its_own_kind() -> None:
    lengths = AnswerLengths()
    for _ in range(ANSWERS):
        lengths.note("m", "agent", 4000)
        lengths.note("m", "titles", 12)
        lengths.note("other", "agent", 80)
    assert lengths.likely("m", "agent", 32_000) == 4000
    assert lengths.likely("m", "titles", 32_000) == LEAST
    assert lengths.likely("other", "agent", 32_000) == 80
    assert lengths.likely("m", "unseen", 32_000) == 4000, "as all clients of that model"


def test_clients_are_forgotten() -> None:
    lengths = AnswerLengths()
    for client in range(3 * MAX_CLIENTS):
        lengths.note("m", client, 7)
    assert len(lengths._seen) <= MAX_CLIENTS
