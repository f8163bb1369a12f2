import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis

from feedback.embedded import start_or_join
from feedback.records import Candidate, Comparison, Demonstration, Prompt
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore

MakeComparison = Callable[..., Comparison]


def feedback(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("INSTRUCTLOOP_")}
    command = [sys.executable, "-m", "feedback", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
async def state(state_dir: Path, make_comparison: MakeComparison) -> Path:
    """A stopped state directory: one comparison that was replaced, one of three, a correction, a damaged entry."""
    with start_or_join(state_dir) as server:
        store = FeedbackStore.connect(server.url, FeedbackSettings())
        versions = tuple(Candidate(text=f"text {v}", completion_id=f"cmpl-{v}", policy_version=v) for v in (1, 2, 2))
        await store.append(make_comparison())
        await store.append(make_comparison(ranking=((1,), (0,))))
        await store.append(make_comparison(labeler="L-2", candidates=versions, ranking=((2,), (0, 1))))
        await store.append(
            Demonstration(
                id="demo_1",
                created=1.0,
                principal="alice",
                labeler="L-2",
                prompt=Prompt(token_ids=(1, 2)),
                completion="better",
                corrects=versions[0],
            )
        )
        await store.close()
        with Redis.from_url(server.url) as client:
            client.xadd("fb:log", {"json": "{}", "sha256": "0"})
    return state_dir


def test_stats_counts_what_the_log_holds(state: Path) -> None:
    done = feedback("stats", "--json", "--state", state)
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert re.fullmatch(r"\d{13}-\d", found.pop("head"))
    assert found == {
        "kinds": {"comparison": 3, "demonstration": 1},
        "labelers": {"L-1": 2, "L-2": 2},
        "versions": {"1": 2, "2": 1},
        "pairs": 3,
        "superseded": 1,
        "quarantined": 1,
    }
    table = feedback("stats", "--state", state).stdout
    assert "comparison" in table
    assert "superseded" in table


def test_native_export_is_the_whole_log(state: Path) -> None:
    done = feedback("export", "--state", state)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["kind"] for row in rows] == ["comparison", "comparison", "comparison", "demonstration"]
    assert [row["stream_id"] for row in rows] == sorted(row["stream_id"] for row in rows)
    assert "\n4 lines, 1 records left out" in done.stderr


def test_pair_export_leaves_out_what_was_replaced_and_what_it_cannot_say(state: Path, tmp_path: Path) -> None:
    output = tmp_path / "pairs.jsonl"
    done = feedback("export", "--format", "trl", "--output", output, "--state", state)
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {"prompt": "tell me about a frog", "chosen": "a frog", "rejected": "a green frog"},
        {"prompt": "tell me about a frog", "chosen": "text 2", "rejected": "text 1"},
        {"prompt": "tell me about a frog", "chosen": "text 2", "rejected": "text 2"},
    ]
    assert done.stdout == ""
    assert "\n3 lines, 2 records left out" in done.stderr
    assert list(tmp_path.iterdir()) == [output]
    assert "preferred_output" in feedback("export", "--format", "openai", "--state", state).stdout


def test_refusals_exit_1_and_usage_errors_exit_2(state_dir: Path) -> None:
    (state_dir / "file").write_text("")
    refused = feedback("stats", "--state", state_dir / "file")
    assert refused.returncode == 1
    assert "cannot use" in refused.stderr
    gone = feedback("export", "--redis-url", "redis://127.0.0.1:1")
    assert gone.returncode == 1
    assert "cannot serve" in gone.stderr
    unwritable = feedback("export", "--state", state_dir, "--output", state_dir / "none" / "x.jsonl")
    assert unwritable.returncode == 1
    assert "x.jsonl cannot be written" in unwritable.stderr
    assert feedback("export", "--format", "csv").returncode == 2
    assert feedback("remember").returncode == 2
