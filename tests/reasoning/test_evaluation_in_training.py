"""The embedded model, hardly trained at all, must score in training what it scores by itself."""

from jaxstack.engine import Engine, EngineConfig
from jaxstack.models.embedded import embedded_model
from jaxstack.models.tokenizer import load_tokenizer
from jaxstack.reasoning.countdown import held_out
from jaxstack.reasoning.datasets import samples, training_row
from jaxstack.reasoning.evaluation import accuracy, answer_problems, evaluation_in_training
from jaxstack.serving import EngineModel
from jaxstack.training import OptimizerConfig, SftConfig, train_sft

PROBLEMS = held_out(8, seed=0)


def test_scores_are_those_of_the_model_by_itself(tmp_path):
    folder = str(embedded_model())
    result = train_sft(
        SftConfig(
            model=folder,
            batch_rows=2,
            seq_len=144,
            max_steps=1,
            optimizer=OptimizerConfig(name="sgd", learning_rate=1e-12, weight_decay=0.0),
        ),
        tmp_path,
        examples=[training_row(sample) for sample in samples("countdown_sft", size=8, seed=0)],
        generation=evaluation_in_training(PROBLEMS, load_tokenizer(folder), thinking=True),
        progress=False,
    )
    engine = Engine.from_folder(folder, EngineConfig(max_sequences=8, max_model_len=176, num_pages=88))
    outcomes = answer_problems(EngineModel(engine), PROBLEMS, thinking=True)
    engine.close()
    scores = result.summary["scores"]
    assert scores["score_accuracy"] == accuracy(outcomes) > 0.3
    assert scores["score_tokens"] == sum(outcome.tokens for outcome in outcomes) / 8
    assert scores["score_unfinished"] == sum(outcome.tokens == 150 for outcome in outcomes) / 8
    assert result.summary["recompilations"] == 0
