"""The vendored reference profiles of the demo's models."""

import json

import numpy as np
import pytest

from gateway.demo import profiles, sample
from monitors import Profile


@pytest.mark.parametrize("name", sample.MODELS)
def test_vendored_profile_is_the_one_the_sample_gives(name) -> None:
    """Made again it is the same: inputs to the byte, the output as far as processors agree."""
    kept, made = (
        {channel["name"]: channel for channel in document.pop("channels")} | {"": document}
        for document in (
            json.loads(sample.profile_path(name).read_text(encoding="utf-8")),
            json.loads(profiles.fit(name).to_json()),
        )
    )
    kept_output, made_output = kept.pop("output:probability"), made.pop("output:probability")

    assert json.dumps(made) == json.dumps(kept)
    # A sigmoid may differ in its last bit between processors; nothing larger may.
    np.testing.assert_allclose(made_output["edges"], kept_output["edges"], atol=1e-6, rtol=0)
    np.testing.assert_allclose(made_output["counts"], kept_output["counts"], atol=3, rtol=0)


def test_writing_profiles_twice_gives_the_same_bytes(tmp_path) -> None:
    """On one machine nothing in them depends on the moment or the order."""
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        for source in (sample.SAMPLE_PATH, *map(sample.model_path, sample.MODELS)):
            (folder / source.name).write_bytes(source.read_bytes())
        written.append({path.name: path.read_bytes() for path in profiles.write(folder)})

    assert written[0] == written[1]
    assert sorted(written[0]) == ["january_june.json", "january_march.json"]


@pytest.mark.parametrize("name", sample.MODELS)
def test_vendored_profile_is_small_and_in_its_own_form(name) -> None:
    """Below 20 kB, and reading and writing it again changes no byte."""
    text = sample.profile_path(name).read_text(encoding="utf-8")

    assert len(text) < 20_000
    assert Profile.from_json(text).to_json() + "\n" == text


@pytest.mark.parametrize("name", sample.MODELS)
def test_vendored_profile_counts_the_rows_of_its_months(name) -> None:
    """Every input and the output are there, each with all rows of the training months."""
    profile = Profile.from_json(sample.profile_path(name).read_text(encoding="utf-8"))
    n_rows = 2000 * len(sample.TRAINING_MONTHS[name])

    inputs = {f"input:{column}" for column in (*sample.NUMBERS, *sample.LEVELS)}
    assert set(profile.channels) == inputs | {"output:probability"}
    assert profile.n_rows == n_rows
    assert (profile.counts.sum(axis=1) == n_rows).all()
