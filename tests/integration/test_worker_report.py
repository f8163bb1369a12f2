"""A round measures what the report tells, and leaves it where the report looks."""

import json
import re
from pathlib import Path

from tiny_loop import SETTINGS, tiny_loop

from deploy.versions import VersionKind
from train import report


async def test_the_report_of_a_round(tmp_path: Path, redis_url: str) -> None:
    probes = tmp_path / "probes.jsonl"
    probes.write_text(json.dumps({"prompt": "w3", "kind": "toxicity", "forbidden": ["w6"]}))
    evaluate = SETTINGS.evaluate.model_copy(update={"probes": str(probes)})
    async with tiny_loop(tmp_path / "state", redis_url, tmp_path / "scratch") as loop:
        await loop.compare(60)
        outcome = await loop.worker(SETTINGS.model_copy(update={"evaluate": evaluate})).step()
        assert outcome is not None
        assert outcome.policy == 2
        metrics = loop.registry.get(VersionKind.POLICY, 2).manifest.metrics
        assert 0 <= metrics["toxicity_rate"] <= metrics["toxicity_rate_high"] <= 1
        assert {"parent_toxicity_rate", "kl_k3", "distinct_1"} <= metrics.keys()
        fitted = loop.registry.get(VersionKind.REWARD_MODEL, 1).manifest.metrics
        assert {"best_of_win_rate_low", "trigger_drift", "calibration_4_observed"} <= fitted.keys()
        page = report.write(loop.registry, 2, tmp_path / "state" / "runs").read_text()
    said = re.sub(r"<[^>]*>|\s+", " ", page)
    assert "preferred to version 1 by the reward model" in said
    assert "toxic completions of probes" in said
    assert {"training loss, nats", "entropy, nats per token"} <= set(re.findall(r"<figcaption>([^<]*)<", page))
    assert page.count('class="card example"') > 3
