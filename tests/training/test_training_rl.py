"""Policy-gradient losses against their definitions in float64, finite differences, themselves rearranged, and a policy
that learns.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoder import decoder

from jaxstack.models import dense_attention
from jaxstack.runtime.errors import UserError
from jaxstack.training import rl
from jaxstack.training.log_probs import decoder_log_probs, make_log_prob_step
from jaxstack.training.losses import chunked, shift_targets
from jaxstack.training.optimizer import OptimizerConfig, build_optimizer
from jaxstack.training.rollouts import Rollout, rollout_batches
from jaxstack.training.step import decoder_loss, init_state, loss_gradients, make_train_step, split_model

VOCAB = 11


def rollouts(count=9, *, seed=0, vocab=VOCAB, longest=9) -> list[Rollout]:
    """Three groups; prompts, two turns in some, one truncated response in four."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        n = int(rng.integers(5, longest + 1))
        mask = np.arange(n) >= 2
        mask[3] &= i % 3 != 0  # a token between two turns
        logp = rng.normal(-2, 0.5, n).astype(np.float32)
        reward = float(rng.choice([0.0, 0.3, 1.0]))
        ids = rng.integers(0, vocab, n).astype(np.int32)
        made.append(Rollout(ids, mask, reward, group=10 * (i % 3), truncated=i % 4 == 1, logp_sampler=logp))
    return made


def batch_of(loss, waves, seed=5, rows=4, length=32):
    """One batch with an old and a reference policy near the given logits, the logits, and where each rollout stands."""
    (batch,) = rollout_batches(loss, waves, row_count=rows, row_length=length)
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, length, VOCAB))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at_token = np.zeros((rows, length))
    for r in range(rows):
        for t in range(1, length):
            at_token[r, t] = logp[r, t - 1, batch["token_ids"][r, t]]
    for name, spread in (("logp_old", 0.4), ("logp_ref", 0.8), ("logp_sampler", 1.0)):
        noise = at_token + spread * rng.normal(size=(rows, length))
        batch[name] = np.where(batch["loss_mask"] != 0, noise, np.nan).astype(np.float32)
    return batch, logits


def reference(loss, name, waves, batch, logits):
    """The definition, rollout by rollout and token by token in float64."""
    logp_of = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    penalty = loss.truncated_penalty if loss.truncated == "penalise" else 0.0
    rewards = [r.reward - penalty * r.truncated for r in waves]
    sequences, kept_tokens = [], 0
    for rollout, reward in zip(waves, rewards):
        group = [x for x, other in zip(rewards, waves) if other.group == rollout.group]
        if name == "Reinforce":
            advantage = reward
        elif name == "DrGrpo":
            advantage = reward - np.mean(group)
        elif name == "Loop":
            advantage = reward - (sum(group) - reward) / (len(group) - 1)
        else:
            std = np.std(group, ddof=1)
            advantage = 0.0 if max(group) == min(group) else (reward - np.mean(group)) / (std + 1e-6)
        # Find the rollout in the batch by its tokens.
        n = len(rollout.token_ids)
        (place,) = [
            (r, s)
            for r in range(len(batch["token_ids"]))
            for s in range(batch["token_ids"].shape[1] - n + 1)
            if (batch["token_ids"][r, s : s + n] == rollout.token_ids).all()
            and (batch["positions"][r, s : s + n] == np.arange(n)).all()
            and len(set(batch["segment_ids"][r, s : s + n])) == 1
        ]
        terms = []
        for t in np.flatnonzero(rollout.loss_mask):
            r, s = place[0], place[1] + t
            logp = logp_of[r, s - 1, rollout.token_ids[t]]
            old, ref, sampler = (float(batch[k][r, s]) for k in ("logp_old", "logp_ref", "logp_sampler"))
            ratio = math.exp(logp - old)
            bounded = min(max(ratio, 1 - loss.eps_low), 1 + loss.eps_high)
            term = -min(ratio * advantage, bounded * advantage) if name != "Reinforce" else -advantage * logp
            if loss.importance_cap is not None:
                term *= min(math.exp(old - sampler), loss.importance_cap)
            terms.append(term + loss.beta * (math.exp(ref - logp) - (ref - logp) - 1))
        dropped = loss.truncated == "mask" and rollout.truncated
        sequences.append([] if dropped else terms)
        kept_tokens += 0 if dropped else len(terms)
    trained = [s for s in sequences if s]
    if name == "Grpo":
        return np.mean([np.mean(s) for s in trained])
    if name == "DrGrpo":
        return sum(map(sum, trained)) / (len(waves) * loss.max_response_tokens)
    return sum(map(sum, trained)) / kept_tokens


LOSSES = [
    rl.Reinforce(importance_cap=2.0),
    rl.PpoClip(beta=0.1, truncated="penalise", truncated_penalty=0.5),
    rl.Grpo(beta=0.05, importance_cap=2.0),
    rl.Grpo(truncated="train"),
    rl.Dapo(),
    rl.DrGrpo(max_response_tokens=12, beta=0.02),
    rl.Loop(eps_low=0.1, eps_high=0.1),
]


def names(loss):
    return type(loss).__name__


def on_device(batch):
    return {k: jnp.asarray(v) for k, v in batch.items()}


def value(loss, logits, targets):
    parts = loss.loss(logits, targets)
    return parts.num / jnp.maximum(parts.den, 1.0), parts


@pytest.mark.parametrize("loss", LOSSES, ids=names)
def test_value_and_gradient_equal_the_definition(loss):
    waves = rollouts()
    batch, logits = batch_of(loss, waves)
    targets = shift_targets(on_device(batch))
    run = jax.jit(jax.value_and_grad(functools.partial(value, loss), has_aux=True))
    (found, parts), gradient = run(jnp.asarray(logits, jnp.float32), targets)
    define = functools.partial(reference, loss, names(loss), waves, batch)
    assert float(found) == pytest.approx(define(logits), rel=2e-5, abs=1e-6)
    # Central differences of the float64 definition along random directions.
    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = rng.normal(size=logits.shape)
        slope = (define(logits + 1e-6 * direction) - define(logits - 1e-6 * direction)) / 2e-6
        assert float(np.sum(np.asarray(gradient, np.float64) * direction)) == pytest.approx(slope, rel=1e-4, abs=1e-6)
    aux = {k: float(a / b) for k, (a, b) in parts.aux.items()}
    assert aux["approx_kl"] > 0 and 0 < aux["entropy"] <= math.log(VOCAB)
    assert ("kl_ref" in aux) == (loss.beta > 0) and aux.get("kl_ref", 1) > 0
    assert ("importance_weight" in aux) == (loss.importance_cap is not None)
    assert aux.get("importance_weight", 1) <= 2.0 and 0 <= aux.get("clip_fraction", 0) < 1


def test_metrics_equal_numpy():
    loss = rl.PpoClip()
    batch, logits = batch_of(loss, rollouts())
    parts = jax.jit(loss.loss)(jnp.asarray(logits, jnp.float32), shift_targets(on_device(batch)))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = {name: [] for name in ("approx_kl", "sampler_gap", "sampler_gap_abs", "clip_fraction", "entropy")}
    for r, t in zip(*np.nonzero(batch["loss_weights"])):
        log_ratio = logp[r, t - 1, batch["token_ids"][r, t]] - batch["logp_old"][r, t]
        gap, advantage = batch["logp_sampler"][r, t] - batch["logp_old"][r, t], batch["advantages"][r, t]
        ratio = math.exp(log_ratio)
        clipped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
        entropy = -(np.exp(logp[r, t - 1]) * logp[r, t - 1]).sum()
        for name, x in zip(found, (ratio - 1 - log_ratio, gap, abs(gap), clipped, entropy)):
            found[name].append(float(x))
    assert 0 < np.mean(found["clip_fraction"]) < 1
    assert parts.aux.keys() == found.keys()
    for name, values in found.items():
        num, den = parts.aux[name]
        assert float(den) == len(values)
        assert float(num / den) == pytest.approx(np.mean(values), rel=1e-4), name


@pytest.mark.parametrize("fill", ["nan", "same"])
def test_on_policy_the_gradient_of_grpo_is_that_of_reinforce(fill):
    grpo = rl.Grpo()
    batch, logits = batch_of(grpo, rollouts())
    logits = jnp.asarray(logits, jnp.float32)
    data = on_device(batch)
    old = jnp.nan
    if fill == "same":
        logp = jax.nn.log_softmax(logits)[:, :-1]
        old = jnp.take_along_axis(logp, data["token_ids"][:, 1:, None], -1)[..., 0]
        old = jnp.pad(old, ((0, 0), (1, 0)))
    targets = shift_targets({**data, "logp_old": jnp.full_like(data["logp_old"], 0) + old})
    found, expected = (
        jax.jit(jax.grad(lambda x, loss=loss: value(loss, x, targets)[0]))(logits) for loss in (grpo, rl.Reinforce())
    )
    assert float(jnp.abs(expected).max()) > 1e-3
    np.testing.assert_allclose(found, expected, atol=2e-6 * float(jnp.abs(expected).max()))


def test_numbers_at_untrained_tokens_and_unknown_samplers_do_no_harm():
    loss = rl.Grpo(beta=0.1, importance_cap=2.0)
    batch, logits = batch_of(loss, rollouts())
    logits = jnp.asarray(logits, jnp.float32)
    run = jax.jit(jax.value_and_grad(lambda x, b: value(loss, x, shift_targets(on_device(b)))[0]))
    clean = {k: np.where(np.isnan(v), 0, v) if v.dtype == np.float32 else v for k, v in batch.items()}
    wild = {
        k: np.where(batch["loss_mask"] != 0, v, -1e30).astype(np.float32) if k.startswith("logp_") else v
        for k, v in batch.items()
    }
    expected = run(logits, clean)
    for other in (batch, wild):
        jax.tree.map(np.testing.assert_array_equal, run(logits, other), expected)
    unknown = {**clean, "logp_sampler": np.full_like(clean["logp_sampler"], np.nan)}
    same = {**clean, "logp_sampler": clean["logp_old"]}
    jax.tree.map(np.testing.assert_array_equal, run(logits, unknown), run(logits, same))


REWARDS = st.lists(st.tuples(st.floats(-3, 3, width=32), st.integers(-2, 2), st.booleans()), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(REWARDS, st.randoms(use_true_random=False))
def test_advantages_are_finite_centred_and_blind_to_order_and_names(rows, rng):
    rewards, groups, truncated = (list(x) for x in zip(*rows))
    order = list(range(len(rows)))
    rng.shuffle(order)
    for loss in (rl.Grpo(), rl.DrGrpo(max_response_tokens=5), rl.Loop(), rl.Dapo(truncated="penalise")):
        found = loss.advantages(rewards, groups, truncated)
        assert found.dtype == np.float32 and found.shape == (len(rows),) and np.isfinite(found).all()
        moved = loss.advantages(
            [rewards[i] for i in order], [7 * groups[i] + 1 for i in order], [truncated[i] for i in order]
        )
        np.testing.assert_allclose(moved, found[order], rtol=1e-4, atol=1e-5)
        for group in set(groups):
            members = [i for i, g in enumerate(groups) if g == group]
            assert abs(found[members].sum()) < 1e-3 * (1 + np.abs(found[members]).sum())
            if len(members) == 1:
                assert found[members[0]] == 0
    informative = rl.informative(rewards, groups)
    assert not rl.Grpo().advantages(rewards, groups)[~informative].any()


def test_groups_with_equal_rewards_have_advantage_zero_exactly():
    rewards = [0.1] * 7 + [1.0, 0.0]
    groups = [0] * 7 + [1, 1]
    for loss in (rl.PpoClip(std_eps=0.0), rl.Grpo(), rl.DrGrpo(max_response_tokens=5), rl.Loop()):
        found = loss.advantages(rewards, groups)
        assert not found[:7].any() and found[7] > 0 > found[8]
    np.testing.assert_array_equal(rl.informative(rewards, groups), [False] * 7 + [True] * 2)
    np.testing.assert_array_equal(rl.Reinforce().advantages(rewards, groups), np.float32(rewards))


def test_soft_overlong_penalty():
    found = rl.soft_overlong_penalty([5, 12, 14, 16, 17], max_tokens=16, buffer_tokens=4)
    np.testing.assert_allclose(found, [0, 0, -0.5, -1, -1])


def test_accumulation_row_order_and_chunks_change_nothing_and_the_method_is_data():
    split, params, _ = split_model(decoder(), nnx.Param)
    waves = rollouts(8, seed=3, vocab=61, longest=14)
    methods = (rl.Grpo(beta=0.1), rl.DrGrpo(max_response_tokens=10, beta=0.1))
    plain, cut = (
        jax.jit(
            lambda p, b, accum=accum, chunk=chunk: loss_gradients(
                split, decoder_loss(methods[0].loss, chunk_tokens=chunk), p, {}, b, accum
            )
        )
        for accum, chunk in ((1, None), (2, 37))
    )
    found = []
    for method in methods:
        (batch,) = rollout_batches(method, waves, row_count=4, row_length=48)
        rng = np.random.default_rng(1)
        for name in ("logp_old", "logp_ref"):
            batch[name] = (-4 + 0.3 * rng.normal(size=(4, 48))).astype(np.float32)
        batch = on_device(batch)
        parts, grads = plain(params, batch)
        other, other_grads = cut(params, {k: v[jnp.array([2, 0, 3, 1])] for k, v in batch.items()})
        assert float(other.den) == pytest.approx(float(parts.den), rel=1e-6)
        assert float(other.num) == pytest.approx(float(parts.num), rel=1e-5)
        for name, (num, den) in parts.aux.items():
            assert float(other.aux[name][1]) == float(den)
            assert float(other.aux[name][0]) == pytest.approx(float(num), rel=1e-4, abs=1e-4)
        for name, gradient in grads.items():
            error = np.linalg.norm(np.asarray(other_grads[name] - gradient)) / np.linalg.norm(gradient)
            assert error < 2e-5, name
        found.append(float(parts.den))
    assert found == [pytest.approx(6), pytest.approx(80)]  # two of eight are masked as truncated
    assert plain._cache_size() == cut._cache_size() == 1


def test_chunked_equals_plain_with_masked_responses():
    loss = rl.Dapo(beta=0.1, importance_cap=2.0)
    batch, logits = batch_of(loss, rollouts())
    targets = {k: v.reshape(-1) for k, v in shift_targets(on_device(batch)).items()}
    logits = jnp.asarray(logits, jnp.float32).reshape(-1, VOCAB)
    expected = jax.jit(loss.loss)(logits, targets)
    found = jax.jit(lambda x, targets: chunked(loss.loss, lambda h: h, x, targets, 19))(logits, targets)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)


def test_log_probs_are_those_of_each_document_alone_with_dense_attention():
    model = decoder()
    split, params, _ = split_model(model, nnx.Param)
    waves = rollouts(6, seed=4, vocab=61, longest=16)
    (batch,) = rollout_batches(rl.Grpo(), waves, row_count=3, row_length=48)
    batch = on_device(batch)
    step = make_log_prob_step(split, decoder_log_probs())
    found = np.asarray(step(params, {}, batch))
    chunks = make_log_prob_step(split, decoder_log_probs(chunk_tokens=37, remat="full"))(params, {}, batch)
    np.testing.assert_allclose(found, chunks, atol=1e-5)
    forward = jax.jit(lambda params, ids: split.merge(params)(ids, jnp.arange(16), dense_attention())[0])
    checked = 0
    for rollout in waves:
        n = len(rollout.token_ids)
        logits = np.asarray(forward(params, jnp.pad(jnp.asarray(rollout.token_ids), (0, 16 - n))), np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [0.0] + [logp[t - 1, rollout.token_ids[t]] for t in range(1, n)]
        ids = np.asarray(batch["token_ids"])
        for r in range(3):
            for s in range(48 - n + 1):
                if (ids[r, s : s + n] == rollout.token_ids).all() and batch["positions"][r, s] == 0:
                    np.testing.assert_allclose(found[r, s : s + n], expected, atol=2e-5)
                    checked += 1
    assert checked == 6
    assert not found[np.asarray(batch["segment_ids"]) == 0].any()


def test_a_policy_learns_from_its_own_samples_without_a_recompilation():
    """One-token answers: the reward is 1 for the upper half of the vocabulary."""
    split, params, _ = split_model(decoder(), nnx.Param)
    loss = rl.Dapo(importance_cap=2.0)
    optimizer = build_optimizer(
        OptimizerConfig(learning_rate=0.01, schedule="constant", warmup_ratio=0.0), params, total_steps=20
    )
    step = make_train_step(split, decoder_loss(loss.loss), optimizer)
    old = make_log_prob_step(split, decoder_log_probs())
    state = init_state(params, optimizer)
    rng = np.random.default_rng(0)
    prompts = [np.array([3, 5], np.int32), np.array([7, 1], np.int32)]
    every = [np.concatenate([prompts[g], [answer]]).astype(np.int32) for g in range(2) for answer in range(61)]
    lookup = [
        Rollout(ids, np.array([False, False, True]), float(i), i // 61) for i, ids in enumerate(every)
    ]  # every possible answer, to read the policy off the trainer's log-probabilities
    tables = rollout_batches(rl.Reinforce(), lookup, row_count=4, row_length=96)
    means = []
    for _ in range(6):
        logp = np.zeros((2, 61))
        for table in tables:
            values = np.asarray(old(state.params, {}, on_device(table)))
            for r, t in zip(*np.nonzero(table["loss_mask"])):
                logp[int(table["advantages"][r, t]) // 61, table["token_ids"][r, t]] = values[r, t]
        np.testing.assert_allclose(np.exp(logp).sum(1), 1, atol=1e-4)
        waves = []
        for group in range(2):
            p = np.exp(logp[group])
            for answer in rng.choice(61, 64, p=p / p.sum()):
                sampled = np.array([0, 0, logp[group, answer]], np.float32)
                ids = np.concatenate([prompts[group], [answer]]).astype(np.int32)
                waves.append(
                    Rollout(ids, np.array([False, False, True]), float(answer >= 31), group, logp_sampler=sampled)
                )
        means.append(np.mean([w.reward for w in waves]))
        (batch,) = rollout_batches(loss, waves, row_count=4, row_length=96)
        data = on_device(batch)
        data["logp_old"] = old(state.params, {}, data)
        for _ in range(2):
            state, metrics = step(state, {}, data)
        gap, tokens = metrics["aux"]["sampler_gap_abs"]
        assert float(tokens) == 128 and float(gap / tokens) < 1e-4
    assert means[-1] > 0.9 > 0.7 > means[0]
    assert step._cache_size() == 1 and old._cache_size() == 1
    assert int(state.updates) == 12


BAD_LOSSES = [
    (lambda: rl.Grpo(eps_low=-0.1), "Grpo.eps_low=-0.1: expected a number of at least 0"),
    (lambda: rl.Grpo(eps_low=1.5), "Grpo.eps_low=1.5: expected at most 1"),
    (lambda: rl.Dapo(beta=math.nan), "Dapo.beta=nan"),
    (lambda: rl.Loop(truncated="drop"), "Loop.truncated='drop': expected mask, penalise or train"),
    (lambda: rl.Loop(truncated_penalty=math.inf), "truncated_penalty=inf"),
    (lambda: rl.Reinforce(importance_cap=0.0), "importance_cap=0.0: expected a positive number, or none"),
    (lambda: rl.PpoClip(std_eps=-1.0), "std_eps=-1.0"),
    (lambda: rl.DrGrpo(max_response_tokens=0), "max_response_tokens=0"),
    (lambda: rl.Grpo().advantages([1.0, math.nan], [0, 0]), "reward of response 1 is nan"),
    (lambda: rl.Grpo().advantages([1.0, 2.0], [0]), "expected one of each a response"),
    (lambda: rl.Grpo(truncated="penalise").advantages([1.0, 2.0], [0, 0], [True]), "one flag a response"),
    (lambda: rl.Grpo().token_weights([3, 0]), "response 1 has no trained token"),
    (lambda: rl.soft_overlong_penalty([1], max_tokens=4, buffer_tokens=5), "buffer_tokens=5"),
    (lambda: rollout_batches(rl.Grpo(), [], row_count=1, row_length=8), "no rollout to make a batch of"),
    (
        lambda: rollout_batches(rl.Grpo(), rollouts(), row_count=1, row_length=4),
        "rollout . has . tokens, expected",
    ),
    (lambda: _one(loss_mask=np.zeros(5, bool)), "rollout 0 has no trained token"),
    (lambda: _one(loss_mask=np.ones(4, bool)), r"rollout 0: loss_mask has shape \(4,\), expected \(5,\)"),
    (lambda: _one(logp_sampler=None), "rollout 0 has no logp_sampler; importance_cap=2.0 needs it"),
    (
        lambda: rl.Grpo(beta=0.1).loss(jnp.zeros((1, 4, 3)), {"token_ids": jnp.zeros((1, 4), int)}),
        "Grpo: the batch has no advantages, loss_weights, loss_shares, logp_old, logp_sampler, logp_ref",
    ),
]


def _one(**fields):
    good = Rollout(np.arange(5, dtype=np.int32), np.arange(5) > 1, 1.0, 0, logp_sampler=np.zeros(5, np.float32))
    return rollout_batches(
        rl.Grpo(importance_cap=2.0), [dataclasses.replace(good, **fields)], row_count=1, row_length=8
    )


@pytest.mark.parametrize("number", range(len(BAD_LOSSES)))
def test_bad_input_gets_one_line(number):
    run, message = BAD_LOSSES[number]
    with pytest.raises(UserError, match=message) as error:
        run()
    assert "\n" not in str(error.value)
