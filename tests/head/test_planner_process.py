import asyncio
import os
import signal

from pdserve.head.planner_process import PlannerProcess
from pdserve.router.planning import Advice, Ratio
from tests.planner.live_support import PROMPTS, FollowedCluster


async def test_the_process_answers_summaries_and_is_replaced_when_it_dies() -> None:
    cluster, answers = FollowedCluster(Ratio(1, 3)), asyncio.Queue[Advice]()
    process = PlannerProcess(answers.put_nowait)
    try:
        process.tell(cluster.summary(None))
        first = await answers.get()
        assert (first.number, first.made_for, first.to) == (1, Ratio(1, 3), None)
        killed = process.pid
        assert killed is not None and os.getpriority(os.PRIO_PROCESS, killed) >= 10
        os.kill(killed, signal.SIGKILL)
        while process.pid == killed:  # noqa: ASYNC110  # until its end is noticed
            await asyncio.sleep(0)
        process.tell(cluster.summary(None))
        second = await answers.get()
        assert second.number == 2 and process.pid not in (None, killed)
        for _ in range(6):
            process.tell(cluster.summary(PROMPTS))
        while (advice := await answers.get()).number < 8:
            pass
        assert advice.to is not None and advice.to.num_prefill > 1
    finally:
        await process.stop()
    assert process.pid is None
