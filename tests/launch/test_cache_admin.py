"""`python -m launch.cache_admin`: what it shows beside a cache that is open, what it removes, and mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
from programs import run

from jaxstack.serving.semantic_cache import CacheConfig, CachedResponse, SemanticCache


class Directions:
    """Texts that begin with the same word are near."""

    id, dim = "directions", 8

    def embed(self, texts):
        rows = np.array([np.random.default_rng(list(text.split()[0].encode())).normal(size=self.dim) for text in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def opened(path: Path) -> SemanticCache:
    config = CacheConfig(delta=0.01, path=str(path), lookup_timeout_ms=30_000)
    return SemanticCache(Directions(), config)


def admin(*words: object) -> tuple[int, str, str]:
    done = run("launch.cache_admin", *map(str, words))
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "answers.sqlite"
    with opened(path) as cache:
        for tenant in ("ann", "bob"):
            for text, model in (("sky", "old"), ("grass", "old"), ("sky then", "new"), ("sky now", "new")):
                request = cache.scope.prompt(text, tenant=tenant, model=model)
                cache.complete(cache.lookup([request])[0], CachedResponse(f"blau? {text}", generation_s=2.0))
                cache.flush()
            cache.ask("sky", pytest.fail, tenant=tenant, model="old")
    return path


def test_it_shows_what_the_cache_holds_while_it_is_open(filled: Path) -> None:
    with opened(filled) as cache:
        code, shown, _ = admin("show", filled, "--json")
        assert code == 0
        owners = {row["owner"]: row for row in json.loads(shown)}
        for tenant in ("ann", "bob"):
            stats, row = cache.stats(tenant), owners[f"t:{tenant}"]
            assert (row["entries"], row["bytes"], row["labels"]) == (4, stats.size_bytes, stats.labels)
            assert row["labels"] > 0
            assert (row["hits"], row["saved_s"]) == (1, 2.0)
            (policy,) = row["policies"]
            assert (policy["policy"], policy["embedder"]) == ("bayes", "directions")
            assert policy["error"] == pytest.approx(stats.error)
        code, listed, _ = admin("list", filled, "--json", "--owner=t:ann", "--model=old")
        rows = json.loads(listed)
        assert code == 0
        assert {(row["owner"], row["model"]) for row in rows} == {("t:ann", "old")}
        assert [row["prompt"] for row in rows] == ["sky", "grass"]  # used last, first
        number = rows[1]["id"]
        whole = json.loads(admin("entry", filled, number, "--json")[1])
        assert whole["answer"] == "blau? grass"
        table = admin("show", filled)[1]
        assert table.splitlines()[0].split()[:2] == ["OWNER", "ENTRIES"]
        assert "blau? grass" in admin("entry", filled, number)[1]
        assert admin("list", filled, "--lines=1")[1].count("\n") == 2
        code, _, said = admin("remove", filled, "--owner=t:ann")
        assert code == 2
        assert "is in use by another process" in said
        assert cache.stats().entries == sum(row["entries"] for row in owners.values())


def test_it_removes_what_fits_all_that_is_given(filled: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.sqlite"
    path.write_bytes(filled.read_bytes())
    before = {row["id"]: row for row in json.loads(admin("list", path, "--json")[1])}
    code, said, _ = admin("remove", path, "--owner=t:ann", "--model=old")
    gone = {n for n, row in before.items() if (row["owner"], row["model"]) == ("t:ann", "old")}
    assert code == 0
    assert json.loads(said) == {"removed": len(gone)} == {"removed": 2}
    with opened(path) as cache:
        assert cache.repeat(cache.scope.prompt("sky", tenant="ann", model="old")) is None
        assert cache.repeat(cache.scope.prompt("sky", tenant="bob", model="old")) is not None
        assert cache.stats().entries == len(before) - len(gone)


def test_mistakes_get_one_line(filled: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no database " * 100)
    cases: dict[tuple[object, ...], str] = {
        (): "command: found none, expected one of show, list, entry, remove",
        ("shew", filled): "command: found 'shew'",
        ("show",): "show: found 0 further words, expected a cache's file",
        ("show", tmp_path / "nothing"): "found no file",
        ("list", text): "cannot be read as a cache",
        ("entry", filled, 9999): "found no entry 9999",
        ("remove", filled): "remove: found nothing to go by",
        ("remove", tmp_path / "nothing", "--everything"): "found no file",
    }
    for words, message in cases.items():
        code, _, errors = admin(*words)
        (said,) = [line for line in errors.splitlines() if line.startswith("error:")]
        assert (code, message in said) == (2, True), said
    assert not (tmp_path / "nothing").exists()
