"""Watches the live engines: one that died, hangs or gives garbage is replaced by a fresh one of its version.

vLLM cannot revive a dead engine, and a dead one may look like a clean exit; so each is asked for a token every
few seconds, and now and then must reproduce the greedy log-probs of its manifest's canary prompts.
"""

import asyncio
import time

from serve.engine import Engine
from serve.errors import EngineFailed
from serve.fleet import Fleet
from serve.settings import ServeSettings


async def supervise(fleet: Fleet, settings: ServeSettings) -> None:
    """Until cancelled."""
    checked: dict[Engine, float] = {}
    while True:
        await asyncio.sleep(settings.probe_seconds)
        engines = dict(fleet.live)
        checked = {engine: checked.get(engine, time.monotonic()) for engine in engines.values()}
        await asyncio.gather(*(engine.probe(settings.probe_seconds) for engine in checked))
        for number, engine in engines.items():
            reason = _fault(engine, settings)
            due = engine.suspect or time.monotonic() - checked[engine] >= settings.canary_check_seconds
            if reason is None and due and not fleet.changing:
                checked[engine] = time.monotonic()
                reason = await _garbage(engine, settings)
            # An in-place change since the look makes what was seen meaningless.
            if reason is not None and fleet.live.get(number) is engine and (engine.dead or not fleet.changing):
                fleet.replace(number, reason)


def _fault(engine: Engine, settings: ServeSettings) -> str | None:
    if engine.dead:
        return "died"
    return "hung" if engine.silent_seconds > settings.engine_hang_seconds else None


async def _garbage(engine: Engine, settings: ServeSettings) -> str | None:
    try:
        async with asyncio.timeout(settings.engine_hang_seconds):
            await engine.check_canary_prompts()
    except EngineFailed:
        return "garbage"
    except Exception:
        return None  # it died or hangs: the next look will tell which
    return None
