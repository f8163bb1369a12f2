import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from redis import Redis

from feedback.embedded import start_or_join
from feedback.log_files import ParquetLog
from feedback.records import Candidate, Comparison, Demonstration, Prompt, Rating, encode, name_digest
from feedback.removal import RawEntry
from feedback.settings import FeedbackSettings
from feedback.store import FeedbackStore

MakeComparison = Callable[..., Comparison]


def feedback(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("INSTRUCTLOOP_")}
    command = [sys.executable, "-m", "feedback", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
async def state(state_dir: Path, make_comparison: MakeComparison) -> Path:
    """Stopped: a comparison that was replaced, one of three, a correction, a rating, a damaged entry."""
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
        await store.append(
            Rating(
                id="rat_1",
                created=1.0,
                principal="alice",
                labeler="L-2",
                prompt=Prompt(text="p"),
                candidate=versions[0],
                overall=5,
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
    assert re.fullmatch(r"\d{13}-\d", found["head"])
    counted = ("comparisons", "demonstrations", "ratings", "erasures", "pairs", "superseded", "quarantined")
    assert {name: found[name] for name in counted} == {
        "comparisons": 3,
        "demonstrations": 1,
        "ratings": 1,
        "erasures": 0,
        "pairs": 3,
        "superseded": 1,
        "quarantined": 1,
    }
    [day] = found["days"]
    assert (day["comparisons"], day["demonstrations"], day["ratings"]) == (3, 1, 1)
    assert {one["labeler"]: one["records"] for one in found["labelers"]} == {"L-1": 2, "L-2": 3}
    assert {one["version"]: (one["comparisons"], one["corrections"], one["overall"]) for one in found["versions"]} == {
        1: (1, 1, 5.0),
        2: (1, 0, None),
    }
    assert found["agreement"]["comparisons"] == 2
    table = feedback("stats", "--state", state).stdout
    assert "comparisons" in table
    assert "superseded" in table


def test_native_export_is_the_whole_log_and_comes_back(state: Path, tmp_path: Path) -> None:
    done = feedback("export", "--state", state)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["kind"] for row in rows] == ["comparison", "comparison", "comparison", "demonstration", "rating"]
    assert [row["stream_id"] for row in rows] == sorted(row["stream_id"] for row in rows)
    assert done.stderr.startswith("5 lines, 1 records left out")
    lines, table = tmp_path / "log.jsonl", tmp_path / "log.parquet"
    lines.write_text(done.stdout)
    assert feedback("export", "--parquet", "--output", table, "--state", state).returncode == 0
    for file in (lines, table):
        imported = feedback("import", file, "--state", tmp_path / file.suffix, "--json")
        assert json.loads(imported.stdout)["added"] == 5, imported.stderr
        assert feedback("export", "--state", tmp_path / file.suffix).stdout == done.stdout
    again = feedback("import", lines, "--state", tmp_path / ".parquet")
    assert again.stdout.startswith("0 records imported, 5 were there")
    refused = feedback("import", lines, "--state", tmp_path / "none", "--redis-url", "redis://127.0.0.1:1")
    assert (refused.returncode, refused.stdout) == (1, "")


def test_archive_is_made_verified_and_grown(state: Path) -> None:
    done = json.loads(feedback("archive", "--state", state, "--json").stdout)
    assert (done["verified"], done["added"], done["files"], done["damaged"]) == (0, 5, 1, 1)
    again = feedback("archive", "--state", state)
    assert again.stdout.startswith("5 records verified, 0 added in 0 files")
    [file] = (state / "archive").glob("*.parquet")
    file.write_bytes(b"PAR1")
    broken = feedback("archive", "--state", state)
    assert broken.returncode == 1
    assert "cannot be read" in broken.stderr and "Traceback" not in broken.stderr


def test_erase_first_tells_and_then_does(state: Path) -> None:
    feedback("archive", "--state", state)
    told = feedback("erase", "alice", "--dry-run", "--state", state)
    assert told.stdout == "would be erased: 5 records, 0 completions, 0 tasks, 5 in the archive\n"
    assert json.loads(feedback("stats", "--json", "--state", state).stdout)["comparisons"] == 3
    done = json.loads(feedback("erase", "alice", "--state", state, "--json").stdout)
    assert (done["records"], done["archived"], done["unreadable"]) == (5, 5, 1)
    left = json.loads(feedback("stats", "--json", "--state", state).stdout)
    assert (left["comparisons"], left["erasures"], left["labelers"], left["unfinished_erasures"]) == (0, 1, [], 0)
    assert [json.loads(line)["kind"] for line in feedback("export", "--state", state).stdout.splitlines()] == [
        "erasure"
    ]


def test_pairs_as_parquet(state: Path, tmp_path: Path) -> None:
    output = tmp_path / "pairs.parquet"
    done = feedback("export", "--format", "trl", "--parquet", "--output", output, "--state", state)
    assert "\n3 rows, 2 records left out" in done.stderr
    assert pq.read_table(output).to_pylist()[0] == {
        "prompt": "tell me about a frog",
        "chosen": "a frog",
        "rejected": "a green frog",
    }
    assert list(tmp_path.iterdir()) == [output]


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


async def test_pairs_of_an_unfinished_erasure_are_not_exported(state: Path) -> None:
    with start_or_join(state) as server:
        store = FeedbackStore.connect(server.url, FeedbackSettings())
        await store.begin_erasure(name_digest("alice"))
        await store.close()
    done = feedback("export", "--format", "trl", "--state", state)
    assert (done.returncode, done.stdout) == (0, "")
    assert "\n0 lines" in done.stderr


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
    assert feedback("export", "--parquet", "--state", state_dir).returncode == 2
    assert feedback("import", "--state", state_dir).returncode == 2
    assert feedback("import", state_dir / "none.jsonl", "--state", state_dir).returncode == 1
    assert feedback("stats", "--state", state_dir, "--dry-run").returncode == 2
    assert feedback("remember").returncode == 2


PEAK_SAID_LAST = """
import atexit, pathlib, runpy, sys
atexit.register(lambda: print(pathlib.Path("/proc/self/status").read_text(), file=sys.stderr))
runpy.run_module("feedback", run_name="__main__")
"""


def peak_mib(*arguments: str | Path) -> float:
    """Peak memory of a command, MiB."""
    command = [sys.executable, "-c", PEAK_SAID_LAST, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    [kib] = re.findall(r"VmHWM:\s+(\d+) kB", done.stderr)
    return int(kib) / 1024


def test_memory_does_not_grow_with_the_log(make_comparison: MakeComparison, tmp_path: Path, state_dir: Path) -> None:
    peaks = []
    for records in (600, 4_000):  # of which commands hold some hundred at a time
        file, state = tmp_path / f"{records}.parquet", state_dir / str(records)
        with ParquetLog(file) as log:
            for number in range(records):
                record = make_comparison(
                    id=f"cmp_{number}", labeler=f"L-{number}", comment=random.randbytes(10_000).hex()
                )
                log.add(RawEntry(f"{1000 + number}-0", record.kind, record.id, *encode(record)))
        peaks.append(
            [
                peak_mib("import", file, "--state", state),
                peak_mib("archive", "--state", state),
                peak_mib("archive", "--state", state),
                peak_mib("export", "--output", tmp_path / "log.jsonl", "--state", state),
                peak_mib("export", "--parquet", "--output", tmp_path / "log.parquet", "--state", state),
                peak_mib(
                    "export", "--format", "trl", "--parquet", "--output", tmp_path / "trl.parquet", "--state", state
                ),
                peak_mib("erase", "alice", "--dry-run", "--state", state),
            ]
        )
    log_mib = (tmp_path / "log.jsonl").stat().st_size / 2**20
    assert log_mib > 60
    assert max(large - small for small, large in zip(*peaks, strict=True)) < log_mib / 2, peaks
