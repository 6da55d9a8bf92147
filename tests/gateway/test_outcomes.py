"""Labels of a rollout: from the store of each host, by prediction id, to a verdict on outcomes."""

# ruff: noqa: ARG005  stand-ins take what they are given
import json
import math

import pytest

from gateway.labels.rows import Joined, Kept, Label, StoreError, pack
from gateway.labels.store import Store
from gateway.labels.target import Target
from gateway.outcomes import OutcomeReader, outcome_of, outcomes_dir
from registry import rollouts
from registry.errors import RolloutError
from tests.rollouts import Rig

STEP = {"weight": 50, "for_s": 1, "units_min": 20}
GUARDS = {"output_shift": {"action": "ignore"}}
OUTCOME = {"metric": "label", "direction": "lower_is_better", "margin": 0.05}


def plan(steps=(STEP,), **outcome):
    return {"steps": list(steps), "guards": GUARDS | {"outcome": OUTCOME | outcome}}


class LabelledRig(Rig):
    """Hosts with a store each; a unit's label arrives some seconds after its prediction."""

    def __init__(self, tmp_path, plan, hosts=("host",), truth=None, delay_s=3.0, **kwargs):
        super().__init__(tmp_path, plan, **kwargs)
        self.truth = truth or (lambda rng, c: float(rng.random() < 0.2))
        self.delay_s = delay_s
        self.stores = {
            host: Store(f"sqlite:///{tmp_path / host / 'labels.sqlite3'}") for host in hosts
        }
        self.readers = {host: self.reader(host) for host in hosts}
        self.waiting: list[tuple[float, str, Label]] = []
        self.n = 0
        self.made: dict[str, list[Kept]] = {}

    def reader(self, host, **kwargs):
        kwargs = {"target": lambda model: Target("score"), "now": lambda: self.now} | kwargs
        return OutcomeReader(self.stores.get(host), self.state_dir, host, **kwargs)

    def drawn(self, name, p, *, is_candidate):
        self.n += 1
        host = self.random.choice(list(self.stores))
        self.keep(host, f"q{self.n}", 9 if is_candidate else 7, p, unit=name)
        value = self.truth(self.random, is_candidate)
        if value is not None:
            label = Label(f"q{self.n}", 0, "m", value)
            self.waiting.append((self.now + self.delay_s, host, label))

    def keep(self, host, request, version, p, *, unit=None, traffic="primary"):
        self.made.setdefault(host, []).append(
            Kept(request, 0, "m", version, traffic, "challenger", self.now, 1.0, p, unit,
                 pack({"score": 0.3}), None)
        )  # fmt: skip

    def written(self):
        """All predictions so far are in the stores."""
        for host, rows in self.made.items():
            self.stores[host].keep(rows)
        self.made.clear()

    def second(self, *args, **kwargs):
        self.written()
        due = [each for each in self.waiting if each[0] <= self.now]
        self.waiting = [each for each in self.waiting if each[0] > self.now]
        for host, store in self.stores.items():
            labels = [label for _, at, label in due if at == host]
            if labels:
                store.label(labels, self.now, is_kept=[True] * len(labels))
        for reader in self.readers.values():
            reader.look({"m": self.rollout})
        super().second(*args, **kwargs)

    def found(self, name="outcome"):
        return next(g for g in self.status()["guards"] if g["guard"] == name)


@pytest.fixture
def rig(tmp_path):
    made = []

    def make(plan, **kwargs):
        made.append(LabelledRig(tmp_path / str(len(made)), plan, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.controller.close()
        for store in each.stores.values():
            store.close()


@pytest.mark.parametrize(
    "truth",
    [
        lambda rng, c: float(rng.random() < (0.5 if c else 0.2)),
        lambda rng, c: rng.lognormvariate(1.0 if c else 0.0, 0.5),
    ],
    ids=["yes or no", "numbers"],
)
def test_a_candidate_whose_outcomes_are_worse_is_aborted_when_labels_say_so(rig, truth) -> None:
    """Not an error, not slow, nothing to see in its answers: only labels tell."""
    it = rig(plan([STEP | {"for_s": 500}]), truth=truth)

    ended = it.until("aborted", requests=60)

    assert ended.reason.startswith("outcome: candidate")
    assert "lower is better, 0.05 is allowed" in ended.reason
    assert it.found()["outcome"]["candidate"] > it.found()["outcome"]["control"]


def test_required_outcomes_hold_a_step_until_they_are_decided(rig) -> None:
    """Units enough and time enough, but no label yet; then an equal candidate is shown to be no
    worse, and promoted. What could have been seen is said.
    """
    it = rig(plan(required=True), delay_s=40)
    for _ in range(40):
        it.second(requests=60)
    assert it.rollout.phase == "step"
    assert (
        "outcome: not yet shown that it is not worse by 0.05; 0 and 0 units" in it.rollout.reason
        or ("outcome: not yet shown" in it.status()["reason"])
    )

    it.until("baking", requests=60)
    steps = sorted((it.state_dir / "rollouts" / it.rollout.id / "steps").iterdir())
    said = json.loads(steps[-1].read_bytes())
    outcome = next(g for g in said["guards"] if g["guard"] == "outcome")["outcome"]
    assert outcome["not_worse"]
    low, high = outcome["difference"][1:]
    assert low < high
    assert outcome["detectable"] == pytest.approx((high - low) / 2, rel=1e-4)


def test_an_outcome_that_is_not_required_delays_nobody(rig) -> None:
    """Labels may take weeks; the guard looks on, also while baking, and then rolls back."""
    it = rig(
        plan() | {"hold_back": 50, "bake_s": 500},
        truth=lambda rng, c: float(rng.random() < (0.6 if c else 0.2)),
        delay_s=15,
    )
    it.until("baking", requests=60, seconds=14)

    assert it.until("aborted", requests=60).reason.startswith("outcome")
    assert it.state.aliases["champion"] == 7


def test_labels_that_depend_on_the_variant_make_a_rollout_invalid(rig) -> None:
    """Half of the candidate's units never get one: who is labelled is no fair sample."""
    it = rig(
        plan([STEP | {"for_s": 500}]),
        truth=lambda rng, c: None if c and rng.random() < 0.5 else float(rng.random() < 0.2),
    )

    held = it.until("holding", requests=80)

    assert held.cause == "invalid"
    assert "labelled_ratio" in held.reason


def test_late_foreign_and_replayed_labels_count_nowhere(rig) -> None:
    """Beyond `labels_within_s`; of calls by number, copies and replays; from before the rollout; of
    a rule, which draws nobody; and of a unit that has one already.
    """
    it = rig(plan([STEP | {"for_s": 500}], labels_within_s=10))
    it.until("step", requests=20)
    store = it.stores["host"]
    began, it.now = it.now, it.rollout.began - 5
    it.keep("host", "before", 9, 0.5)
    it.now = began
    for traffic in ("pinned", "shadow", "replay", "fallback"):
        it.keep("host", traffic, 9, 0.5, traffic=traffic)
    it.keep("host", "rule", 9, 1.0)
    it.keep("host", "other", 8, 0.5)
    it.keep("host", "late", 9, 0.5)
    it.keep("host", "one", 9, 0.5, unit="same")
    it.keep("host", "two", 9, 0.5, unit="same")
    it.waiting.clear()
    it.written()
    names = ("before", "pinned", "shadow", "replay", "fallback", "rule", "other", "one", "two")
    labels = [Label(name, 0, "m", 1.0) for name in names]
    store.label(labels, it.now, is_kept=[True] * len(labels))
    store.label([Label("late", 0, "m", 1.0)], it.now + 11, is_kept=[True])

    it.second()
    it.now += 100
    it.second()

    assert it.found()["candidate"] == {"hits": 1, "of": 1}
    assert it.found()["control"]["of"] == 0
    assert it.status()["labels"]["host"] == {"units": 1, "unusable": 0, "problem": None}


def test_stores_of_several_hosts_add_up_and_a_unit_on_both_counts_once(rig) -> None:
    """Each host reads its own; the controller of either adds the files up."""
    it = rig(plan([STEP | {"for_s": 500}]), hosts=("host", "other"))
    it.until("step", requests=50)
    for _ in range(6):
        it.second(requests=50)
    it.waiting.clear()
    for host in it.stores:
        it.keep(host, f"both-{host}", 9, 0.5, unit="on both")
        it.written()
        label = Label(f"both-{host}", 0, "m", 1.0)
        it.stores[host].label([label], it.now, is_kept=[True])
    before = it.found()
    it.second()
    after = it.found()

    files = sorted(outcomes_dir(it.state_dir, it.rollout.id).iterdir())
    assert [path.stem for path in files] == ["host", "other"]
    assert set(it.status()["labels"]) == {"host", "other"}
    total = before["candidate"]["of"] + before["control"]["of"]
    assert after["candidate"]["of"] + after["control"]["of"] == total + 1


def test_reading_goes_on_after_a_restart_and_survives_a_store_that_is_away(rig) -> None:
    """Nothing is counted twice, nothing lost; what is wrong is said, and nobody waits for it."""
    it = rig(plan([STEP | {"for_s": 500}]), delay_s=1)
    for _ in range(6):
        it.second(requests=50)
    before = it.found()

    class Away:
        def reading(self):
            raise StoreError("the server is away")

    it.readers["host"]._store = Away()
    it.second(requests=50)
    it.second(requests=50)
    assert it.status()["labels"]["host"]["problem"].endswith("the server is away")

    it.controller.close()
    it.controller = it.new_controller()
    it.readers["host"] = it.reader("host")
    it.second()
    it.second()
    after = it.found()
    assert it.status()["labels"]["host"]["problem"] is None
    assert after["candidate"]["of"] + after["control"]["of"] > (
        before["candidate"]["of"] + before["control"]["of"] + 80
    )
    units = it.status()["labels"]["host"]["units"]
    it.readers["host"] = it.reader("host")
    it.second()
    assert it.status()["labels"]["host"]["units"] == units


def test_a_label_that_comes_before_its_prediction_is_written_counts_all_the_same(rig) -> None:
    """The second look at each label, a minute later."""
    it = rig(plan([STEP | {"for_s": 500}]))
    it.until("step", requests=20)
    it.waiting.clear()
    it.stores["host"].label([Label("early", 0, "m", 1.0)], it.now, is_kept=[True])
    it.keep("host", "next", 7, 0.5)
    it.written()
    it.stores["host"].label([Label("next", 0, "m", 1.0)], it.now + 0.5, is_kept=[True])
    it.second()
    it.keep("host", "early", 9, 0.5)
    it.second()
    it.second()
    assert it.status()["labels"]["host"]["units"] == 1

    it.now += 70
    it.second()
    it.second()

    assert it.status()["labels"]["host"]["units"] == 2


def test_a_host_that_keeps_no_predictions_says_so_and_a_rollout_that_is_over_reads_nothing(
    rig,
) -> None:
    """`labels.sample` is 0: whoever looks at the rollout sees why nothing comes."""
    it = rig(plan([STEP | {"for_s": 500}], required=True))
    it.readers = {"host": OutcomeReader(None, it.state_dir, "host", target=lambda model: None,
                                        now=lambda: it.now)}  # fmt: skip
    it.until("step", requests=20)
    it.second()
    assert "labels.sample is 0" in it.status()["labels"]["host"]["problem"]

    it.move(lambda state: rollouts.abort(state, "no", now=it.now))
    path = outcomes_dir(it.state_dir, it.rollout.id) / "host.json"
    seen = path.read_bytes()
    it.reader("host").look({"m": it.rollout})
    assert path.read_bytes() == seen


@pytest.mark.parametrize(
    ("metric", "value", "label", "expected"),
    [
        ("label", 0.3, 2.5, 2.5),
        ("label", 0.3, "spam", None),
        ("wrong", 0.3, 1.0, 1.0),
        ("wrong", 0.7, 1.0, 0.0),
        ("wrong", [0.1, 0.9], 1.0, 0.0),
        ("wrong", "ham", "spam", 1.0),
        ("wrong", 3, 3.0, 0.0),
        ("wrong", math.nan, 1.0, None),
        ("absolute_error", 0.25, 1.0, 0.75),
        ("squared_error", 0.5, 1.0, 0.25),
        ("squared_error", [0.5, 0.5], 1.0, None),
        ("absolute_error", None, 1.0, None),
    ],
)
def test_an_outcome_is_the_label_or_how_the_answer_missed_it(
    metric, value, label, expected
) -> None:
    """None where it cannot be reckoned: such a label is counted as unusable."""
    row = Joined("q", 0, 9, "primary", "challenger", 1.0, 1.0, 0.5, None, {"y": value}, label, 2.0)

    assert outcome_of(metric, row, Target("y")) == expected


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ({"metric": "label"}, "direction: say lower_is_better or higher_is_better"),
        ({"metric": "wrong", "direction": "higher_is_better"}, "of wrong lower is better"),
        ({"metric": "wrong", "margin": -1}, "margin: must be 0 or more"),
        ({"metric": "wrong", "labels_within_s": 0}, "labels_within_s"),
        ({"metric": "wrong", "required": True, "action": "ignore"}, "required and ignored"),
        ({"metric": "auc"}, "plan.guards.outcome.metric"),
    ],
)
def test_a_plan_says_what_is_wrong_with_its_outcome(outcome, words) -> None:
    """Where, and what would be right."""
    with pytest.raises(RolloutError, match=words):
        rollouts.parse_plan({"guards": {"outcome": outcome}})
