"""Publish, alias, promote, restore, withdraw and collect in any order, against a simple model.

The model: a number means one content for ever, a revision one document for ever, restore brings a
document back, and what the newest revision names is on disk.
"""

import contextlib
import errno
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gateway import admission
from gateway.admission import Admitted
from gateway.errors import StorageError, VersionTakenError, VersionWithdrawnError
from gateway.publisher import publish
from registry import catalog, changes, gc, store
from registry.errors import ChangeError, ConflictError
from registry.manifest import Runtime, SignatureEntry, TensorEntry
from registry.revisions import ModelState, Revisions
from tests import models

TENSORS = (TensorEntry("x", "FP32", (-1,)),)
ADMITTED = Admitted(SignatureEntry(TENSORS, TENSORS), Runtime(), 0.1, 0.1, 1, ())
CONTENTS = [models.constant(k) for k in range(5)]
NUMBERS = st.integers(1, 6)


class Life(RuleBasedStateMachine):
    """One registry directory, and what must be true of it."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.root = self.folder / "models"
        self.root.mkdir()
        self.contents: dict[int, int] = {}
        """By version: which content it has; also of those collected."""
        self.present: set[int] = set()
        self.withdrawn: set[int] = set()
        self.documents: dict[int, dict[str, ModelState]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def chain(self) -> Revisions:
        return Revisions(self.root / ".driftgate")

    def note(self) -> None:
        """Remember the documents that are new."""
        for revision in self.chain.history():
            self.documents.setdefault(revision.number, revision.models)

    def content_file(self, k: int) -> Path:
        file = self.folder / "trained.onnx"
        file.write_bytes(CONTENTS[k])
        return file

    @rule(k=st.integers(0, 4), number=st.none() | NUMBERS, alias=st.sampled_from([None, "trial"]))
    def publish(self, k: int, number: int | None, alias: str | None) -> None:
        known = [n for n in self.present if self.contents[n] == k]
        try:
            made = publish(self.root, "m", self.content_file(k), version=number, alias=alias)
        except VersionTakenError:
            assert number in self.present
            assert not known
        except VersionWithdrawnError:
            assert known
            assert known[0] in self.withdrawn
        else:
            assert made.is_new == (not known)
            assert made.version in known or made.version == (
                number or max(self.present, default=0) + 1
            )
            self.contents[made.version] = k
            self.present.add(made.version)
        self.note()

    @rule(k=st.integers(0, 4), n=st.integers(0, 12))
    def publish_on_a_failing_disk(self, k: int, n: int) -> None:
        left = n

        def fail(_: str) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.EIO, "injected")

        known = any(self.contents[number] == k for number in self.present)
        before = max(self.present, default=0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "steps", fail)
            with contextlib.suppress(StorageError, VersionWithdrawnError):
                publish(self.root, "m", self.content_file(k))
        if not known and (self.root / "m" / str(before + 1)).exists():
            self.contents[before + 1] = k
            self.present.add(before + 1)

    @rule(version=NUMBERS, alias=st.sampled_from(["champion", "trial"]))
    def name(self, version: int, alias: str) -> None:
        may = version in self.present - self.withdrawn
        try:
            self.apply(changes.Alias("m", alias, version))
        except ChangeError:
            assert not may
        else:
            assert self.chain.head().models["m"].aliases[alias] == version

    @rule()
    def roll_back(self) -> None:
        with contextlib.suppress(ChangeError):
            self.apply(changes.Rollback("m"))

    @precondition(lambda self: self.documents)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.documents)))
        wanted = self.documents[number].get("m", ModelState()).aliases
        try:
            document = self.chain.get(number)
            self.apply(changes.Restore(document))
        except ChangeError:
            assert set(wanted.values()) - (self.present - self.withdrawn)
        else:
            assert self.chain.head().models["m"].aliases == wanted

    def apply(self, change: changes.Change) -> None:
        with contextlib.suppress(ConflictError):
            changes.apply(
                self.chain,
                change,
                known=changes.OnDisk(self.root),
                actor="ana",
                via="python",
                force=True,
            )
        self.note()

    @rule(version=NUMBERS)
    def withdraw(self, version: int) -> None:
        named = gc.references([self.chain.head()])
        if version in self.present and ("m", version) not in named:
            gc.withdraw(self.root, "m", version, reason="", by="ana", time="")
            self.withdrawn.add(version)

    @rule(keep=st.integers(1, 3))
    def collect(self, keep: int) -> None:
        found = catalog.scan(self.root)
        plan = gc.plan(found, self.chain.history(), keep=keep, age_s_min=0, now=4e9)
        gone = {one.files.version for one in gc.collect(plan, self.chain)}
        assert max(self.present - self.withdrawn, default=0) not in gone
        self.present -= gone

    @invariant()
    def a_number_means_one_content(self) -> None:
        found = catalog.scan(self.root)
        versions = {files.version: files for files in found.models.get("m", ())}
        assert versions.keys() == self.present - self.withdrawn
        for number, files in versions.items():
            assert files.model_file.read_bytes() == CONTENTS[self.contents[number]]
            assert files.digest is not None

    @invariant()
    def a_revision_means_one_document(self) -> None:
        chain = self.chain
        assert chain.verify() == []
        for number, document in self.documents.items():
            assert chain.get(number).models == document

    @invariant()
    def what_is_named_is_there(self) -> None:
        for state in self.chain.head().models.values():
            assert set(state.aliases.values()) <= self.present - self.withdrawn


def test_a_life_in_any_order_keeps_numbers_and_revisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look in the child process is shown elsewhere."""
    monkeypatch.setattr(admission, "admit", lambda _: ADMITTED)

    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=30,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
