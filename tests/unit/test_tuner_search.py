"""The tuner's search, with a runner that answers by functions of the candidates; and its journal."""

from collections import defaultdict
from dataclasses import replace

from moe_ops.cli.known import known_card
from moe_ops.cli.tuner.calls import Call, part_key, tiles_from_json, tiles_to_json
from moe_ops.cli.tuner.journal import Journal
from moe_ops.cli.tuner.pool import Answer
from moe_ops.cli.tuner.search import COMPILE, DEVICE, MARGIN, Search
from moe_ops.tuning.lookup import heuristic_tiles
from tests.unit import fake_worker

H200 = known_card("h200").device
CALL = Call((8, 2, 256, 1024), 64, "bfloat16", "none", "tma")
OWN = heuristic_tiles(CALL.problem(), H200, "tma")


class FakeRunner:
    """Answers by functions of the candidate, at a `step` as a pool does; counts what it was asked."""

    def __init__(self, ms=fake_worker.milliseconds, error=lambda op, candidate: None):
        self.ms, self.error, self.asked, self.waiting = ms, error, [], []

    def submit(self, lane, request, done, order=0):
        assert lane == (COMPILE if request["op"] == "compile" else DEVICE)
        self.asked.append(request)
        self.waiting.append((order, request, done))

    def step(self):
        assert self.waiting, "the search waits for nothing"
        _, request, done = self.waiting.pop(min(range(len(self.waiting)), key=lambda n: self.waiting[n][0]))
        done(self.answer(request))

    def answer(self, request) -> Answer:
        for index, candidate in enumerate(request["candidates"]):
            if error := self.error(request["op"], candidate):
                return Answer(error=error, culprit=index)
        if request["op"] == "race":
            return Answer([self.ms(candidate) for candidate in request["candidates"]])
        return Answer({})


class Journals(defaultdict):
    """A journal for every bucket that is asked for."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __missing__(self, bucket):
        self[bucket] = Journal(self.folder / bucket.file_name, {"device": "H200"})
        return self[bucket]


def search(tmp_path, runner, calls=(CALL,)):
    founds, journals = [], Journals(tmp_path / "journals")
    Search(H200, runner, journals).run(calls, founds.append)
    for journal in journals.values():
        journal.close()
    return founds


def test_the_best_of_both_gemms_wins(tmp_path):
    runner = FakeRunner()
    (found,) = search(tmp_path, runner)
    assert found.entry.tiles.up.num_stages == 4 and found.entry.tiles.down.group_m == 32
    assert found.entry.ms < found.entry.heuristic_ms == fake_worker.milliseconds(tiles_to_json(OWN))
    assert found.failed == {} and found.candidates > 10
    verified = [request["candidates"][0] for request in runner.asked if request["op"] == "verify"]
    assert verified == [tiles_to_json(found.entry.tiles)]


def test_less_than_the_margin_is_noise(tmp_path):
    own = tiles_to_json(OWN)
    (found,) = search(tmp_path, FakeRunner(ms=lambda candidate: 1.0 if candidate == own else 1 - MARGIN * 0.9))
    assert found.entry.tiles is None and found.entry.ms == found.entry.heuristic_ms == 1.0


def test_a_win_has_to_happen_twice(tmp_path):
    """Every race but the final ones says that something is twice as fast."""
    own = tiles_to_json(OWN)

    class Luck(FakeRunner):
        def answer(self, request):
            if request["op"] != "race":
                return Answer({})
            final = len(request["candidates"]) == 2
            return Answer([1.0 if candidate == own or final else 0.5 for candidate in request["candidates"]])

    (found,) = search(tmp_path, Luck())
    assert found.entry.tiles is None


def test_a_winner_that_is_wrong_is_not_taken(tmp_path):
    def error(op, candidate):
        return "rms error is above" if op == "verify" and candidate["down"]["group_m"] == 32 else None

    (found,) = search(tmp_path, FakeRunner(error=error))
    assert found.entry.tiles is None or found.entry.tiles.down.group_m != 32
    assert any("wrong result: rms error is above" in reason for reason in found.failed.values())


def test_a_candidate_that_takes_a_race_with_it_is_left_out(tmp_path):
    def error(op, candidate):
        return "its process ended" if op == "race" and candidate["up"]["num_stages"] == 4 else None

    (found,) = search(tmp_path, FakeRunner(error=error))
    assert found.entry.tiles.up.num_stages == 5  # as fast as four, by the fake's formula
    assert found.failed and set(found.failed.values()) == {"its process ended"}


def test_a_heuristic_that_fails_is_said(tmp_path):
    own = tiles_to_json(OWN)
    (found,) = search(tmp_path, FakeRunner(error=lambda op, candidate: "broken" if candidate == own else None))
    assert found.entry is None and found.error == "the heuristic's own tiles failed: broken"


def test_calls_are_told_one_by_one(tmp_path):
    calls = [replace(CALL, tokens=tokens) for tokens in (1, 64, 4096)]
    founds = search(tmp_path, FakeRunner(), calls)
    assert sorted(found.call.tokens for found in founds) == [1, 64, 4096]
    assert all(found.entry is not None for found in founds)


def test_what_the_journal_has_is_not_asked_again(tmp_path):
    first, second = FakeRunner(), FakeRunner()
    founds = search(tmp_path, first)
    assert search(tmp_path, second)[0].entry == founds[0].entry
    assert second.asked == []


def test_what_failed_without_a_candidate_is_asked_again(tmp_path):
    class Full(FakeRunner):
        def answer(self, request):
            return Answer(error="out of memory")

    assert search(tmp_path, Full())[0].error.endswith("out of memory")
    assert search(tmp_path, FakeRunner())[0].entry is not None


def test_every_kernel_is_compiled_once(tmp_path):
    """Calls of many numbers of tokens, and of models that differ in the experts alone, share kernels."""
    calls = [replace(CALL, tokens=tokens) for tokens in (64, 96, 128)]
    calls += [replace(call, sizes=(16, 2, 256, 1024)) for call in calls]
    runner = FakeRunner()
    search(tmp_path, runner, calls)
    compiled = [request for request in runner.asked if request["op"] == "compile"]
    keys = [part_key(Call.from_json(r["call"]), tiles_from_json(r["candidates"][0]), r["part"]) for r in compiled]
    assert len(keys) == len(set(keys)) and {request["part"] for request in compiled} == {"up", "down", "other"}


def test_kernels_of_different_calls_are_not_taken_for_equal():
    """What a key leaves out is what no kernel depends on."""
    keys = {
        part_key(call, OWN, part)
        for call in (
            CALL, replace(CALL, tokens=63), replace(CALL, sizes=(8, 2, 512, 1024)), replace(CALL, dtype="float16"),
            replace(CALL, sizes=(8, 2, 256, 512)), replace(CALL, path="classic"), replace(CALL, format="fp8_block"),
        )
        for part in ("up", "down")
    }  # fmt: skip
    assert len(keys) == 14
    assert part_key(CALL, OWN, "up") == part_key(replace(CALL, tokens=128), OWN, "up")
    assert part_key(CALL, OWN, "other") != part_key(replace(CALL, tokens=128), OWN, "other")


def test_equal_gemms_are_tuned_once(tmp_path):
    """(8, 2) at 64 tokens has the rows an expert of (16, 2) at 128: its winner races the heuristic, and no more."""
    twin = replace(CALL, sizes=(16, 2, 256, 1024), tokens=128)
    assert twin.gemms == CALL.gemms and twin.bucket != CALL.bucket
    runner = FakeRunner()
    first, second = search(tmp_path, runner, [CALL, twin])
    assert first.candidates > 10 and second.candidates == 2
    assert second.entry.tiles == first.entry.tiles and second.entry.tokens == 128
    sizes = [len(request["candidates"]) for request in runner.asked if request["call"]["tokens"] == 128]
    assert max(sizes) == 2


def test_a_twin_that_is_not_faster_keeps_the_heuristic(tmp_path):
    """What wins for one number of experts need not for another."""
    twin = replace(CALL, sizes=(16, 2, 256, 1024), tokens=128)

    class Other(FakeRunner):
        def answer(self, request):
            if request["op"] == "race" and request["call"]["tokens"] == 128:
                return Answer([1.0 for _ in request["candidates"]])
            return super().answer(request)

    first, second = search(tmp_path, Other(), [CALL, twin])
    assert first.entry.tiles is not None and second.entry.tiles is None


def test_nothing_faster_ends_the_search_early(tmp_path):
    """Where one change gains nothing, none further along is compiled."""
    runner = FakeRunner(ms=lambda candidate: 1.0)
    (found,) = search(tmp_path, runner)
    fruitful, _ = FakeRunner(), None
    (other,) = search(tmp_path / "other", fruitful)
    assert found.entry.tiles is None and found.candidates < other.candidates


def test_one_after_another_and_together_find_the_same(tmp_path):
    calls = [replace(CALL, tokens=tokens) for tokens in (16, 64, 256, 1024, 4096, 8192, 16384)]
    together = {found.call: found.entry for found in search(tmp_path / "together", FakeRunner(), calls)}
    for call in calls:
        assert search(tmp_path / str(call.tokens), FakeRunner(), [call])[0].entry == together[call]


# The journal.


def test_a_journal_survives_what_cuts_it_off(tmp_path):
    file, head = tmp_path / "folder" / "journal", {"device": "H200"}
    journal = Journal(file, head)
    journal.put("a", 1)
    journal.put("b", {"c": None})
    journal.close()
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        journal = Journal(file, head)
        journal.put("z", 2)
        journal.close()
        again = Journal(file, head)
        assert again.get("z") == 2 and again.get("a") in (None, 1) and again.get("b") in (None, {"c": None})
        again.close()
    file.write_bytes(content + b"\xff[[{\n[1]\n")
    journal = Journal(file, head)
    assert len(journal) == 2 and journal.get("b") == {"c": None}
    journal.remove()
    assert not file.exists()


def test_a_journal_of_other_versions_is_begun_anew(tmp_path):
    journal = Journal(tmp_path / "journal", {"triton": "3.6"})
    journal.put("a", 1)
    journal.close()
    assert len(Journal(tmp_path / "journal", {"triton": "3.7"})) == 0
