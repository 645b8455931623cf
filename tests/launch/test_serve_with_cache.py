"""`python -m launch.serve --semantic_cache`: answers survive a SIGKILL, the file is one process's, and mistakes."""

import json
import signal
from pathlib import Path

import httpx
from byte_model import byte_model, save
from programs import run, start


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    folder, file = tmp_path / "tiny-model", tmp_path / "answers.sqlite"
    save(folder, byte_model(64))
    small = ["--port=0", "--max_sequences=1", "--max_batch_tokens=16"]
    keys, tenants = tmp_path / "keys", tmp_path / "tenants.json"
    keys.write_text("ann=secret\n")
    tenants.write_text(json.dumps({"ann": {"delta": 0.01, "share_group": "us"}, "bob": {"share_group": "us"}}))
    flags = [f"--model={folder}", *small, "--semantic_cache", "--delta=0.03", f"--cache_path={file}"]
    flags += [f"--api_keys={keys}", f"--cache_tenants={tenants}"]
    body = {"model": "tiny-model", "prompt": "abc", "temperature": 0, "max_tokens": 30, "guided_choice": ["yes", "no"]}
    answers = []
    for last in (False, True):
        server = start("launch.serve", *flags)
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("serving"), server.communicate()
        headers = {"authorization": "Bearer secret"}
        with httpx.Client(base_url=line.split()[-1], timeout=60, trust_env=False, headers=headers) as http:
            answers.append(http.post("/completions", json=body))
            assert http.get("/cache/stats").json()["delta"] == 0.01
            if not last:
                second = run("launch.serve", *flags)
                assert second.returncode == 2
                assert "answers.sqlite is in use by another process" in second.stderr
                assert "Traceback" not in second.stderr
                # Returns when all that was before is on file.
                assert http.post("/cache/invalidate", json={"prompt_prefix": "zzz"}).json() == {"removed": 0}
        server.send_signal(signal.SIGTERM if last else signal.SIGKILL)
        rest, errors = server.communicate(timeout=120)
    assert server.returncode == 0, errors
    assert [answer.headers["x-cache"] for answer in answers] == ["miss", "exact"]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]
    summary = json.loads(rest.splitlines()[-1])
    assert summary["cache"]["requests"]["exact"] == 1
    assert summary["cache"]["delta"] == 0.03
    assert summary["generation_tokens"] == 0


def test_mistakes_with_the_cache_get_one_line(tmp_path: Path) -> None:
    folder, text = tmp_path / "tiny-model", tmp_path / "text"
    save(folder, byte_model(64))
    text.write_text("no database " * 100)
    tenants = tmp_path / "tenants.json"
    tenants.write_text('{"ann": {"delta": "small"}}')
    cases = {
        "--delta=0.1": "--delta: found it without --semantic_cache",
        "--semantic_cache --delta=0": "delta: found 0.0, expected more than 0 and at most 0.5",
        f"--semantic_cache --cache_path={text}": "cannot be read as a cache",
        f"--semantic_cache --cache_embedder={tmp_path / 'none'}": "expected ngrams, minilm, a folder or URL#MODEL",
        "--semantic_cache --cache_policy=static --cache_threshold=1.5": "threshold: found 1.5, expected a number from",
        "--semantic_cache --cache_threshold=0.9": "--cache_threshold: found it with --cache_policy=bayes, expected",
        "--semantic_cache --cache_policy=static --delta=0.1": "--delta: found it with --cache_policy=static, expected",
        "--semantic_cache --cache_judge_cosine=0.8": "--cache_judge_cosine: found it with --cache_judge=text, expected",
        f"--semantic_cache --cache_tenants={text}": "cannot be read",
        f"--semantic_cache --cache_tenants={tenants}": "ann: found {'delta': 'small'}, expected an object with delta",
        "--semantic_cache --cache_embedder_key=k": "found it with --cache_embedder=ngrams, expected URL#MODEL",
        "--semantic_cache --cache_lookup_timeout_ms=0": "lookup_timeout_ms: found 0.0, expected a positive number",
    }
    for flags, message in cases.items():
        done = run("launch.serve", f"--model={folder}", "--port=0", *flags.split())
        assert "Traceback" not in done.stderr
        (said,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert message in said
        assert done.returncode == 2, flags
    done = run("launch.serve", "--model=/nowhere", "--port=0", "--semantic_cache")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "/nowhere" in done.stderr
