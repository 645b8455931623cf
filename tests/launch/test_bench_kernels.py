"""bench_kernels as a user runs it, and the parts that its figures rest on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import run

from kernels import kv_write as kv_write_package
from launch.kernel_benchmark import attention, case, heads_and_rows, measure, mixture


def test_a_run_writes_its_summary_and_plot(tmp_path):
    flags = ["--ops=matmul,kv_write", "--shapes=64x96", "--rows=1,3", "--seconds=0.01"]
    done = run("launch.bench_kernels", *flags, f"--workdir={tmp_path / 'new'}")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary == json.loads((tmp_path / "new" / "summary.json").read_text())
    assert (tmp_path / "new" / "bench_kernels.png").read_bytes().startswith(b"\x89PNG")
    rows = summary["results"]
    assert {row["op"] for row in rows} == {"matmul", "kv_write"}
    assert "64x96, 3 rows" in done.stderr
    for row in rows:
        assert row["error"] <= (1e-2 if "bf16" in row["implementation"] else 1e-5), row
        if row["ms"] is not None:
            assert row["ms"] > 0 and row["share_of_limit"] >= 0
    assert any(row["ms"] for row in rows)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--ops=matmul,sort", "error: --ops: unknown operation 'sort'; expected some of matmul, paged_attention"),
        ("--shapes=64", "error: --shapes: found '64', expected KxN such as 896x4864"),
        ("--rows=0", "error: --rows: found '0', expected a positive whole number"),
        ("--scale=huge", "error: flag --scale=huge: value should be one of <default|full>"),
    ],
)
def test_bad_usage(flag, message, tmp_path):
    done = run("launch.bench_kernels", flag, f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not done.stdout and not list(tmp_path.iterdir())


def test_each_operation_begins_with_a_case_for_errors_alone_that_meets_the_oracle():
    cases = [
        attention.attention_cases,
        attention.kv_write_cases,
        mixture.grouped_matmul_cases,
        mixture.lora_matmul_cases,
        heads_and_rows.rms_norm_rope_cases,
    ]
    for first in (next(some("default")) for some in cases):
        assert not first.timed and "xla" in first.forms and "ref" not in first.forms
        rows = list(measure.rows_of(first, 0.0, 1e9))
        assert all(row["ms"] is None and row["error"] < 1e-5 for row in rows), rows


def test_an_error_is_found_and_a_form_that_cannot_run_is_left_out():
    wrong = case.Form(jax.jit(lambda x: x + 0.5), [(jnp.asarray([2.0, -4.0]),)], 16)
    broken = case.Case("op", "label", {"wrong": wrong}, lambda: jnp.asarray([2.0, -4.0]))
    assert broken.error(wrong) == pytest.approx(0.5 / 4)

    def refusing(x, implementation):
        raise ValueError(f"{implementation} does not take this")

    refused = case.forms_of(kv_write_package, refusing, [(1,)], 1)
    assert refused == {}


def test_times_of_a_form_that_gives_its_first_argument_away():
    form = case.Form(jax.jit(lambda x, y: x + y, donate_argnums=0), [(jnp.zeros(3), jnp.ones(3))], 1, carried=True)
    one = case.Case("op", "label", {"add": form}, lambda: np.ones(3))
    assert one.error(form) == 0  # and leaves the inputs alive
    assert measure.least_seconds(one.forms, 0.01)["add"] > 0
