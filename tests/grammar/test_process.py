"""The real process: it dies of grammars that would take for ever, and only their owners are affected."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator

import pytest

from pdserve.core.errors import NoWorkerAvailable, QueueFull
from pdserve.grammar.checker import MAX_QUESTIONS_EACH, GrammarChecker
from pdserve.grammar.lanes import GrammarLanes
from pdserve.grammar.messages import GrammarSetup
from pdserve.grammar.process import GrammarProcess
from pdserve.grammar.sources import json_schema_grammar, regex_grammar
from pdserve.grammar.thread import GrammarThread

from ..processes import await_end
from .support import RecordingListener, setup, tokens

SLOW_MASK = regex_grammar("(a{1000}){1000}")  # compiles in a millisecond
LATE_BOMB = regex_grammar("b(a{1000}){1000}")
DEEP = "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1} "b"' for i in range(100_000)) + '\nr100000: "x"'


@pytest.fixture
def listener() -> RecordingListener:
    return RecordingListener()


@pytest.fixture
async def process(listener: RecordingListener) -> AsyncIterator[GrammarProcess]:
    process = GrammarProcess(setup, listener)
    yield process
    await process.stop()


@pytest.fixture
async def checker() -> AsyncIterator[GrammarChecker]:
    checker = GrammarChecker(setup)
    yield checker
    await checker.stop()


async def test_it_starts_on_demand_and_returns_masks(
    process: GrammarProcess, listener: RecordingListener
) -> None:
    assert process.pid is None
    process.open(1, regex_grammar("ab"))
    kind, key, (num_tokens, allowed) = await listener.answers.get()
    assert (kind, key, num_tokens) == ("mask", 1, 0) and tokens("ab")[0] in allowed
    process.advance(1, tokens("ab")[0])
    assert await listener.answers.get() == ("mask", 1, (1, set(setup().eos_token_ids)))


@pytest.mark.parametrize("bomb", [SLOW_MASK, DEEP], ids=["slow mask", "deep rules"])
async def test_only_the_request_with_a_grammar_bomb_is_refused(
    process: GrammarProcess, listener: RecordingListener, bomb: str
) -> None:
    process.open(1, regex_grammar("ab+"))
    before = await listener.answers.get()
    process.open(2, bomb)
    process.advance(1, tokens("a")[0])
    process.open(3, regex_grammar("cd"))
    answers = {key: (kind, what) for kind, key, what in [await listener.answers.get() for _ in range(3)]}
    assert before[0] == "mask"
    assert answers[2][0] == "refused"
    assert answers[1][0] == answers[3][0] == "mask"
    assert answers[1][1][0] == 1


async def test_a_process_that_somebody_kills_is_replaced(
    process: GrammarProcess, listener: RecordingListener
) -> None:
    process.open(1, regex_grammar("ab+"))
    await listener.answers.get()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.advance(1, tokens("ab")[0])
    kind, key, (num_tokens, allowed) = await listener.answers.get()
    assert (kind, key, num_tokens) == ("mask", 1, 1) and set(setup().eos_token_ids) < allowed


async def test_a_process_that_cannot_start_fails_its_requests_without_blaming_them(
    listener: RecordingListener,
) -> None:
    process = GrammarProcess(lambda: GrammarSetup("no tokenizer", 10, (0,)), listener)
    process.open(1, regex_grammar("ab"))
    assert await listener.answers.get() == ("failed", 1, "the grammar process does not start")
    await process.stop()


async def test_a_failed_start_is_reported_to_waiting_callers(listener: RecordingListener) -> None:
    def missing() -> GrammarSetup:
        raise FileNotFoundError("tokenizer.json")

    process = GrammarProcess(missing, listener)
    process.open(1, regex_grammar("ab"))
    assert await listener.answers.get() == ("failed", 1, "the grammar process does not start")
    await process.stop()


async def test_an_output_resumed_after_much_work_is_not_refused(
    process: GrammarProcess, listener: RecordingListener
) -> None:
    """The cost of its earlier tokens is granted again when another process resumes it."""
    grammar = regex_grammar("(ab?c?){3000}d*")
    text = tuple(tokens("abc")) * 900
    process.open(1, grammar, text)
    kind, _, what = await listener.answers.get()
    assert kind == "mask", what


async def test_it_is_gone_when_it_was_stopped(listener: RecordingListener) -> None:
    process = GrammarProcess(setup, listener)
    process.open(1, regex_grammar("ab"))
    await listener.answers.get()
    pid = process.pid
    assert pid is not None
    await process.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_it_ends_with_its_owner() -> None:
    """This holds even when the owner could not announce its end."""
    owner = (
        "import asyncio, os\n"
        "from pdserve.grammar.process import GrammarProcess\n"
        "from tests.grammar.support import RecordingListener, setup\n"
        "async def main():\n"
        "    listener = RecordingListener()\n"
        "    process = GrammarProcess(setup, listener)\n"
        "    process.open(1, 'start: \"a\"')\n"
        "    await listener.answers.get()\n"
        "    print(process.pid, flush=True)\n"
        "    os._exit(1)\n"
        "asyncio.run(main())\n"
    )
    child = await asyncio.create_subprocess_exec("python", "-c", owner, stdout=asyncio.subprocess.PIPE)
    # The standard output's other end is the grammar process's standard error too, if anything.
    pid, _ = await child.communicate()
    await asyncio.to_thread(await_end, int(pid))


async def test_a_costly_clients_outputs_do_not_delay_others(listener: RecordingListener) -> None:
    """Each of the attacker's takes some hundred times as long as all of the victim's."""
    lanes = GrammarLanes(setup, listener)
    lanes.open(0, SLOW_MASK, (), "attacker")
    assert (await listener.answers.get())[:2] == ("refused", 0)
    for key in range(1, 11):
        lanes.open(key, regex_grammar(f"(a{{1000}}){{{1000 + key}}}"), (), "attacker")
    lanes.open(11, regex_grammar("a+"), (), "victim")
    num_tokens = num_refused = 0
    while num_tokens < 50:
        kind, key, what = await listener.answers.get()
        if key == 11:
            assert (kind, what[0]) == ("mask", num_tokens)
            lanes.advance(11, tokens("a")[0])
            num_tokens += 1
        else:
            num_refused += 1
    assert num_refused < 5, "on a busy machine some may come before; behind each other, all would"
    await lanes.stop()


async def test_a_client_that_turns_costly_goes_on_where_it_was(listener: RecordingListener) -> None:
    lanes = GrammarLanes(setup, listener)
    lanes.open(0, regex_grammar("ab+"), (), "attacker")
    await listener.answers.get()
    lanes.open(1, SLOW_MASK, (), "attacker")
    assert (await listener.answers.get())[:2] == ("refused", 1)
    lanes.advance(0, tokens("ab")[0])
    kind, key, what = await listener.answers.get()
    assert (kind, key, what[0]) == ("mask", 0, 1)
    assert lanes._costly.pid is not None
    await lanes.stop()


async def test_the_checker_separates_good_grammars_from_bad_ones(checker: GrammarChecker) -> None:
    assert await checker.check(regex_grammar("ab"), "me") is None
    assert "regex parse error" in str(await checker.check(regex_grammar("((("), "me"))
    for bomb in (SLOW_MASK, LATE_BOMB):
        assert await checker.check(bomb, "me") is not None
    assert await checker.check(regex_grammar("ab"), "me") is None


HUGE = {
    "a pattern of many expressions": json_schema_grammar(
        '{"type": "string", "pattern": "^((a+)+)+$", "minLength": 5000}'
    ),
    "choices multiplied": json_schema_grammar(
        json.dumps(
            {"allOf": [{"oneOf": [{"required": [f"p{i}"]}, {"required": [f"q{i}"]}]} for i in range(24)]}
        )
    ),
    "rules doubled": "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)) + '\nr60: "a"',
    "many alternatives": "start: " + " | ".join(f'"a{i}"' for i in range(5000)),
}


@pytest.mark.parametrize("name", HUGE)
async def test_a_grammar_that_grows_without_end_is_refused(checker: GrammarChecker, name: str) -> None:
    assert await checker.check(HUGE[name], "mallory")
    assert await checker.check(regex_grammar("ab"), "alice") is None


async def test_many_costly_grammars_of_one_client_do_not_delay_others(
    checker: GrammarChecker,
) -> None:
    order: list[str] = []

    async def check(grammar: str, client: str) -> None:
        await checker.check(grammar, client)
        order.append(client)

    bombs = [check(regex_grammar(f"(a{{1000}}){{{1000 + i}}}"), "attacker") for i in range(5)]
    await asyncio.gather(*bombs, check(regex_grammar("ab"), "victim"))
    # the attacker's later ones are another process's, which may be sooner for some, but not for all of them
    assert order.index("victim") < len(bombs)


async def test_a_client_over_its_grammar_quota_is_refused_alone(
    checker: GrammarChecker,
) -> None:
    checks = [checker.check(regex_grammar(f"a{{{i}}}"), "me") for i in range(MAX_QUESTIONS_EACH + 1)]
    results = await asyncio.gather(
        *checks, checker.check(regex_grammar("b"), "other"), return_exceptions=True
    )
    assert [type(result) for result in results if result is not None] == [QueueFull]


async def test_clients_with_many_questions_leave_places_for_newcomers(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.grammar.checker.MAX_QUESTIONS", 16)
    asked = [("mallory", 10), ("mike", 10), ("alice", 1), ("bob", 1), ("carol", 1)]
    checks = [checker.check(regex_grammar(f"{name}{{{i}}}"), name) for name, num in asked for i in range(num)]
    results = await asyncio.gather(*checks, return_exceptions=True)
    assert [type(result) for result in results] == [type(None)] * 14 + [QueueFull] * 6 + [type(None)] * 2 + [
        QueueFull
    ]


async def test_a_client_never_waits_for_another_clients_question(
    checker: GrammarChecker,
) -> None:
    order: list[str] = []

    async def check(grammar: str, client: str) -> None:
        await checker.check(grammar, client)
        order.append(client)

    bombs = [check(regex_grammar(f"(a{{1000}}){{{1000 + i}}}"), "attacker") for i in range(3)]
    await asyncio.gather(*bombs, check(regex_grammar("ab"), "attacker"), check(regex_grammar("ab"), "victim"))
    assert order.index("victim") <= 1


async def test_simultaneous_equal_questions_get_one_answer(checker: GrammarChecker) -> None:
    checks = [checker.check(regex_grammar("ab"), "me") for _ in range(10 * MAX_QUESTIONS_EACH)]
    assert set(await asyncio.gather(*checks)) == {None}


async def test_a_departed_client_keeps_its_turn_until_its_question_is_answered(
    checker: GrammarChecker,
) -> None:
    """Otherwise it could ask without end."""
    for number in range(MAX_QUESTIONS_EACH):
        asking = asyncio.ensure_future(checker.check(regex_grammar(f"a{{{number}}}"), "me"))
        await asyncio.sleep(0)
        asking.cancel()
    with pytest.raises(QueueFull):
        await checker.check(regex_grammar("b"), "me")
    assert await checker.check(regex_grammar("b"), "other") is None


async def test_a_grammar_that_cannot_be_checked_is_not_called_bad() -> None:
    checker = GrammarChecker(lambda: GrammarSetup("no tokenizer", 10, (0,)))
    with pytest.raises(NoWorkerAvailable):
        await checker.check(regex_grammar("ab"), "me")
    await checker.stop()


def test_a_thread_asks_and_another_receives_the_answer() -> None:
    import queue

    answers: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()

    class Listener(RecordingListener):
        def on_mask(self, key: int, num_tokens: int, bits: bytes) -> None:
            answers.put((key, num_tokens))

    thread = GrammarThread(setup, Listener())
    thread.open(1, regex_grammar("ab+"), tuple(tokens("a")), "me")
    assert answers.get(timeout=60.0) == (1, 1)
    thread.advance(1, tokens("b")[0])
    assert answers.get(timeout=60.0) == (1, 2)
    thread.close(1)
    thread.stop()
    thread.stop()
