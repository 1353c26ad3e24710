"""The tuner's worker processes: lanes, order, crashes, hangs, and workers that do not start."""

import json
from pathlib import Path

import pytest

from moe_ops.cli.tuner.calls import tiles_to_json
from moe_ops.cli.tuner.candidates import first_wave
from moe_ops.cli.tuner.pool import Answer, Pool, PoolError
from tests.unit import fake_worker
from tests.unit.test_tuner_search import CALL, H200


def answers_of(pool: Pool, lane: str, requests: list[dict]) -> list[Answer]:
    """Has requests answered."""
    answers: dict[int, Answer] = {}
    for number, request in enumerate(requests):
        pool.submit(lane, request, lambda answer, number=number: answers.__setitem__(number, answer))
    while len(answers) < len(requests):
        pool.step()
    return [answers[number] for number in range(len(requests))]


@pytest.fixture
def start(tmp_path):
    """Makes a pool of fake workers with settings; the file that they note their requests in is its second."""
    pools = []

    def make(limit=2.0, workers=2, **values):
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(values))
        pools.append(Pool(limit=limit))
        pools[-1].open("lane", fake_worker.main, (str(file),), workers)
        return pools[-1], Path(f"{file}.requests")

    yield make
    for pool in pools:
        pool.end()


def requests(wave, op="compile"):
    return [{"op": op, "call": CALL.to_json(), "candidates": [tiles_to_json(tiles)]} for tiles in wave]


WAVE = first_wave(CALL.problem(), H200, "tma")
STAGES = [tiles.up.num_stages for tiles in WAVE]


def test_workers_answer_in_order(start):
    pool, noted = start()
    assert pool.hello("lane")["device"]["name"] == "Fake GPU"
    asked = requests(WAVE, "race")
    answers = answers_of(pool, "lane", asked)
    assert [answer.result for answer in answers] == [[fake_worker.milliseconds(r["candidates"][0])] for r in asked]
    assert len(noted.read_text().splitlines()) == len(asked)


def test_lower_orders_come_first(start):
    pool, noted = start(workers=1)
    pool.hello("lane")
    left = set(range(6))
    for number in (5, 1, 3, 0, 4, 2):
        request = {"op": "race", "candidates": [], "number": number}
        pool.submit("lane", request, lambda _, number=number: left.discard(number), order=number)
    while left:
        pool.step()
    assert [json.loads(line)["number"] for line in noted.read_text().splitlines()] == list(range(6))


def test_a_crash_and_a_hang_cost_only_themselves(start):
    pool, _ = start(limit=1.0, crash=[{"up.num_stages": 5}], hang=[{"down.group_m": 32}], fail=[{"up.group_m": 32}])
    answers = answers_of(pool, "lane", requests(WAVE))
    kinds = {"its process ended with status 3": 0, "it hung for 1 s": 0, "RuntimeError: fail": 0, None: 0}
    for tiles, answer in zip(WAVE, answers, strict=True):
        kinds[answer.error] += 1
        assert (answer.culprit is None) == (answer.error is None)
        if tiles.up.num_stages == 5:
            assert answer.error == "its process ended with status 3"
        elif tiles.down.group_m == 32:
            assert answer.error == "it hung for 1 s"
        elif tiles.up.group_m == 32:
            assert answer.error == "RuntimeError: fail"
    assert min(kinds.values()) >= 1 and sum(kinds.values()) == len(WAVE)


def test_workers_that_do_not_start(start):
    pool, _ = start(no_start=True)
    with pytest.raises(PoolError, match=r"3 workers in a row ended before they had done anything: .* status 7"):
        pool.hello("lane")
