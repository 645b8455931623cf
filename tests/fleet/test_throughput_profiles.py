"""Profiles: the roofline against a plain loop and known figures, files there and back, files of others, mistakes."""

import json
import math

import numpy as np
import pytest

from jaxstack.fleet.profile import (
    DATASHEETS,
    AcceleratorType,
    LatencyObjective,
    LengthGrid,
    ThroughputProfile,
    load_profile,
    save_profile,
    throughput_from_datasheet,
)
from jaxstack.fleet.profile.files import save_aibrix_profile
from jaxstack.fleet.profile.lengths import PAPER_SIZED_GRID
from jaxstack.fleet.profile.roofline import MODELS, Roofline
from jaxstack.runtime.errors import UserError

LLAMA = MODELS["llama-2-7b"]
GRID = LengthGrid((25, 1000, 8000), (25, 250, 2000))
OBJECTIVE = LatencyObjective(0.12)


def plainly(sheet, read: int, written: int, tpot_s: float) -> tuple[float, int]:
    """The law of the docstring, one batch size after the other."""
    gigabytes, bandwidth, flops = sheet.device.memory_bytes, sheet.device.bytes_per_s, sheet.device.flops_per_s
    parameters, weights, kv = 6.74e9, 13.48e9, 524_288
    best = (0.0, 0)
    for batch in range(1, 257):
        if batch > math.floor(math.floor((0.9 * gigabytes - weights) / kv) / (read + written)):
            break
        decode = max(2 * parameters * batch / (0.5 * flops),
                     (weights + batch * kv * (read + written / 2)) / (0.8 * bandwidth)) + 0.003  # fmt: skip
        step = decode + batch / written * (2 * parameters * read / (0.5 * flops) + 0.003)
        if step <= tpot_s and batch / (written * step) > best[0]:
            best = (batch / (written * step), batch)
    return best


@pytest.mark.parametrize("tpot_s", [0.12, 0.04])
def test_the_roofline_is_its_law(tpot_s):
    profile = throughput_from_datasheet(list(DATASHEETS.values()), LLAMA, GRID, LatencyObjective(tpot_s))
    assert profile.concurrency is not None
    for name, sheet in DATASHEETS.items():
        for i, read in enumerate(GRID.input_edges_tokens):
            for j, written in enumerate(GRID.output_edges_tokens):
                rate, batch = plainly(sheet, read, written, tpot_s)
                assert profile.max_rate_rps[name][i, j] == pytest.approx(rate, rel=1e-9)
                assert profile.concurrency[name][i, j] == batch


def test_which_type_is_best_depends_on_the_size():
    # Tokens for a dollar: the small card for small requests, the large ones for long prompts.
    profile = throughput_from_datasheet(list(DATASHEETS.values()), LLAMA, PAPER_SIZED_GRID, OBJECTIVE)
    best = {}
    for size in ((25, 100), (25, 250), (1000, 250), (4000, 250)):
        bucket = PAPER_SIZED_GRID.bucket(*size)
        value = {n: profile.max_rate_rps[n][bucket] / s.price_usd_per_hour for n, s in DATASHEETS.items()}
        best[size] = max(value, key=lambda name: value[name])
    assert best == {(25, 100): "L4", (25, 250): "A100-80GB", (1000, 250): "A100-80GB", (4000, 250): "H100"}


def test_rates_fall_with_the_prompts_length_and_with_a_tighter_objective():
    loose = throughput_from_datasheet(list(DATASHEETS.values()), LLAMA, PAPER_SIZED_GRID, OBJECTIVE)
    tight = throughput_from_datasheet(list(DATASHEETS.values()), LLAMA, PAPER_SIZED_GRID, LatencyObjective(0.04))
    first = LatencyObjective(0.12, ttft_s=0.3)
    prompt = throughput_from_datasheet(list(DATASHEETS.values()), LLAMA, PAPER_SIZED_GRID, first)
    for name, table in loose.max_rate_rps.items():
        # Not with the output's: a long prompt is spread over few steps where the answer is short.
        assert (np.diff(table, axis=0) <= 1e-12).all()
        assert (tight.max_rate_rps[name] <= table + 1e-12).all()
        assert (prompt.max_rate_rps[name] <= table + 1e-12).all()
        assert prompt.max_rate_rps[name][-1].max() == 0 < table[0].min()


def test_a_model_that_does_not_fit_is_never_served():
    profile = throughput_from_datasheet([DATASHEETS["A10G"]], MODELS["llama-2-70b"], GRID, OBJECTIVE)
    assert profile.max_rate_rps["A10G"].max() == 0
    assert Roofline(DATASHEETS["A10G"].device, MODELS["llama-2-70b"]).kv_tokens == 0
    many = DATASHEETS["A100-80GB"].times(2)
    assert (many.name, many.devices, many.price_usd_per_hour) == ("2xA100-80GB", 2, 7.34)
    assert throughput_from_datasheet([many], MODELS["llama-2-70b"], GRID, OBJECTIVE).max_rate_rps[many.name].max() > 0


def test_a_file_there_and_back(tmp_path):
    sheets = [DATASHEETS["L4"], DATASHEETS["H100"]]
    profile = throughput_from_datasheet(sheets, LLAMA, GRID, LatencyObjective(0.12, 2.0, 0.95))
    types = (sheets[0].accelerator(4), sheets[1].accelerator())
    save_profile(tmp_path / "profile.json", profile, types)
    again, named = load_profile(tmp_path / "profile.json")
    assert named == types and again.grid == profile.grid and again.objective == profile.objective
    assert again.source == "datasheet" and again.provenance == profile.provenance
    assert again.concurrency is not None and profile.concurrency is not None
    for name in profile.names:
        assert np.array_equal(again.max_rate_rps[name], profile.max_rate_rps[name])
        assert np.array_equal(again.concurrency[name], profile.concurrency[name])


def test_files_of_aibrix_have_a_type_each(tmp_path):
    found = {"gpu": "a100", "cost": 2.5, "indexes": [[8, 16, 32], [128, 256]], "created": 1.0,
             "tputs": [[60.0, 31.0], [30.0, 29.0], [15.0, 0.0]],
             "e2e": [[0.1, 0.2], [0.4, 0.6], [0.8, 9.9]], "slos": {"percentile": 99, "tpot": 0.1}}  # fmt: skip
    (tmp_path / "a100.json").write_text(json.dumps(found))
    (tmp_path / "l4.json").write_text(json.dumps(found | {"gpu": "l4", "cost": 0.5}))
    profile, types = load_profile(tmp_path / "a100.json", tmp_path / "l4.json")
    assert [(t.name, t.price_usd_per_hour) for t in types] == [("a100", 2.5), ("l4", 0.5)]
    assert profile.grid == LengthGrid((128, 256), (8, 16, 32)) and profile.objective == LatencyObjective(0.1)
    assert profile.max_rate_rps["a100"].tolist() == [[60.0, 30.0, 15.0], [31.0, 29.0, 0.0]]
    assert profile.concurrency is not None
    assert profile.concurrency["a100"] == pytest.approx(np.array([[6.0, 12.0, 12.0], [6.2, 17.4, 0.0]]))
    save_aibrix_profile(tmp_path / "out.json", profile, types[0])
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["tputs"] == found["tputs"] and written["indexes"] == found["indexes"]
    assert written["slos"] == found["slos"] and written["cost"] == 2.5
    assert written["e2e"][1] == pytest.approx([0.4, 0.6]) and written["e2e"][2][1] == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "found no JSON"),
        ("[1]", "found a list, expected a profile"),
        ("{}", "found neither 'version' nor 'tputs'"),
        ('{"version": 7}', "version: found 7, expected 1"),
        ('{"version": 1}', "the field 'grid' is missing"),
        ('{"version": 1, "grid": {"input_edges_tokens": [5], "output_edges_tokens": [2]}, "objective": {"tpot_s": -1},'
         ' "types": {}}', "objective: tpot_s: found -1"),
        ('{"version": 1, "grid": {"input_edges_tokens": [5], "output_edges_tokens": [2]}, "objective": {"tpot_s": 1},'
         ' "types": {"a": {"price_usd_per_hour": 1, "max_rate_rps": [[1, 2]]}}}', "found a table of 1 x 2"),
        ('{"gpu": "a", "tputs": [[1.0]], "indexes": [[8], [4, 2]]}', "input_edges_tokens: found \\[4, 2\\]"),
    ],
)  # fmt: skip
def test_files_that_are_no_profiles(text, message, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=f"bad.json: .*{message}") as caught:
        load_profile(tmp_path / "bad.json")
    assert "\n" not in str(caught.value)


def test_files_that_do_not_go_together(tmp_path):
    profile = throughput_from_datasheet([DATASHEETS["L4"]], LLAMA, GRID, OBJECTIVE)
    save_profile(tmp_path / "a.json", profile, [DATASHEETS["L4"].accelerator()])
    other = throughput_from_datasheet([DATASHEETS["H100"]], LLAMA, PAPER_SIZED_GRID, OBJECTIVE)
    save_profile(tmp_path / "b.json", other, [DATASHEETS["H100"].accelerator()])
    with pytest.raises(UserError, match=r"b.json: found another grid than in .*a.json"):
        load_profile(tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(UserError, match="found 'L4', which is in a file before it"):
        load_profile(tmp_path / "a.json", tmp_path / "a.json")
    with pytest.raises(UserError, match=r"nowhere.json: cannot be read"):
        load_profile(tmp_path / "nowhere.json")


def test_a_cell_without_a_number_cannot_be_served():
    profile = ThroughputProfile(LengthGrid((5,), (2, 4)), {"a": [[None, 2.0]]}, OBJECTIVE)  # type: ignore[dict-item]
    assert profile.max_rate_rps["a"].tolist() == [[0.0, 2.0]]
    assert profile.loads(["a"])[0, :, 0].tolist() == [math.inf, 0.5]
    with pytest.raises(UserError, match="concurrency, expected in both"):
        ThroughputProfile(LengthGrid((5,), (2,)), {"a": [[1.0]]}, OBJECTIVE, {"b": [[1.0]]})  # type: ignore[dict-item]
    assert AcceleratorType("a", 0.0).max_count is None
