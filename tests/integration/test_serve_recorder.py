"""Finished completions reach Redis in batches."""

import asyncio

from feedback.records import Prompt
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore
from serve.metrics import Metrics
from serve.recording import Asked, Recorder, Sampled, SampledChoice
from serve.settings import ServeSettings


async def test_run_writes_what_gathers(redis_url: str) -> None:
    store, metrics = FeedbackStore.connect(redis_url, FeedbackSettings()), Metrics()
    recorder = Recorder(store, ServeSettings(), metrics)
    running = asyncio.create_task(recorder.run())
    ids = [f"cmpl-{number}" for number in range(20)]
    for completion_id in ids:
        recorder.expect(
            Asked(
                completion_id=completion_id,
                object="text_completion",
                principal="local",
                user=None,
                model="policy-v3",
                policy_version=3,
                tokenizer="digest",
                prompts=(Prompt(text="hello"),),
                metadata={},
                store=None,
            )
        )
        choice = SampledChoice(0, "x", [5], [-0.5], "stop")
        recorder.sampled(
            Sampled(
                f"{completion_id}-0", {}, recorded=True, finished=True, prompt_token_ids=[1, 2], choices={0: choice}
            )
        )
    async with asyncio.timeout(5):
        while b"instructloop_recorded_total 20.0" not in metrics.page():
            await asyncio.sleep(0.02)
    kept = [await store.completion(completion_id) for completion_id in ids]
    assert [completion.id for completion in kept if completion] == ids
    running.cancel()
    await store.close()
