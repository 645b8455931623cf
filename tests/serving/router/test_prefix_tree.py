"""The tree of marks against a list of what was told, gone through from the beginning each time."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jaxstack.serving.prefix_keys import keys_of_tokens
from jaxstack.serving.router.prefix_tree import PrefixTree

REPLICAS = ("a", "b", "c")
EXPIRY_S = 10.0
prompts = st.lists(st.integers(0, 1), max_size=6).map(tuple)
replicas = st.sampled_from(REPLICAS)


def keys(prompt: tuple[int, ...]) -> tuple[int, ...]:
    return keys_of_tokens(prompt, 1).keys


class Told(RuleBasedStateMachine):
    """`seen[replica][prefix]` is when it was last seen; whoever loses a prefix loses all that go on from it."""

    def __init__(self) -> None:
        super().__init__()
        self.tree, self.now_s = PrefixTree(expiry_s=EXPIRY_S), 0.0
        self.seen: dict[str, dict[tuple[int, ...], float]] = {name: {} for name in REPLICAS}

    @rule(prompt=prompts, replica=replicas)
    def insert(self, prompt: tuple[int, ...], replica: str) -> None:
        self.tree.insert(keys(prompt), replica, self.now_s)
        self.seen[replica] |= {prompt[: i + 1]: self.now_s for i in range(len(prompt))}

    @rule(prompt=prompts.filter(bool), replica=replicas)
    def evict(self, prompt: tuple[int, ...], replica: str) -> None:
        self.tree.evict(keys(prompt)[-1:], replica)
        self.seen[replica] = {p: at for p, at in self.seen[replica].items() if p[: len(prompt)] != prompt}

    @rule(replica=replicas)
    def restart(self, replica: str) -> None:
        self.tree.forget(replica)
        self.seen[replica] = {}

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.seen = {
            name: {p: at for p, at in told.items() if self.now_s - at <= EXPIRY_S} for name, told in self.seen.items()
        }

    @rule(prompt=prompts)
    def match(self, prompt: tuple[int, ...]) -> None:
        def depth(replica: str) -> int:
            return next((i for i in range(len(prompt)) if prompt[: i + 1] not in self.seen[replica]), len(prompt))

        assert self.tree.match(keys(prompt), REPLICAS, self.now_s) == {name: depth(name) for name in REPLICAS}

    @invariant()
    def books(self) -> None:
        nodes = self.tree._nodes
        marks = [mark for node in nodes.values() for mark in node.marks.values()]
        assert len(self.tree) == len(marks)
        assert all(node.marks for node in nodes.values())
        for name in REPLICAS:
            assert self.tree.size(name) == sum(m.owner == self.tree._owner.get(name) for m in marks)
            assert self.tree.size(name) >= len(self.seen[name])
        for node in nodes.values():
            assert node.parent is None or node.marks.keys() <= node.parent.marks.keys()
            assert all(nodes[child.key] is child for child in node.children or ())


TestTold = Told.TestCase
TestTold.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_nobody_sees_again_leaves_the_memory_too() -> None:
    tree = PrefixTree(expiry_s=EXPIRY_S)
    for second in range(1000):
        tree.insert(keys_of_tokens([7, second, second], 1).keys, "a", float(second))
        tree.evict(keys_of_tokens([7, second - 1], 1).keys[1:], "a")
    assert tree.size("a") == len(tree) <= 2 * 12 and len(tree._queue) <= 3 * 12
    tree.forget("a")
    for second in (2000.0, 2020.0):
        tree.insert([1], "b", second)
    assert len(tree) == 1 == len(tree._nodes) == len(tree._queue)


def test_the_oldest_marks_give_way() -> None:
    tree = PrefixTree(max_marks=16)
    old, new = ([keys_of_tokens([i, j, 0], 1).keys for j in range(5)] for i in (1, 2))
    for step, prompt in enumerate(old + new):
        tree.insert(prompt, "a", float(step))
        tree.insert(old[0], "a", float(step))  # in use all the time
    assert len(tree) <= 16
    assert all(tree.match(prompt, ["a"], 10.0)["a"] == 3 for prompt in [old[0], *new])
