"""The embedded model's card says what its record says."""

import json

from jaxstack.models.embedded import embedded_model
from launch import model_record

FOLDER = embedded_model()
RECORD = json.loads((FOLDER / "training.json").read_text())


def test_card_is_made_from_the_record():
    assert (FOLDER / "MODEL.md").read_text() == model_record.model_card(RECORD)


def test_record_lists_every_shipped_file():
    assert set(RECORD["sha256"]) == set(model_record.SHIPPED)
    assert set(RECORD["stages"]) == {"base", "sft"}


def test_training_seconds_add_up_over_starts(tmp_path):
    rows = [{"step": 10, "step_time_s": 0.5}, {"step": 20, "step_time_s": 0.25}, {"step": 25, "step_time_s": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert model_record.training_seconds(tmp_path) == 12.5
