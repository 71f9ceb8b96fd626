"""United and pruned stores hold what their sources held, and nothing is made of sources that
contradict each other.
"""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitdistill.errors import ConfigError, DataError
from vitdistill.labels.store import LabelStore
from vitdistill.labels.tools import merge, prune

PLACES = [(view, part) for view in range(2) for part in range(5)]


# -- merge ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=8)
@given(
    missing=st.lists(st.sets(st.sampled_from(PLACES)), min_size=1, max_size=3),
    already=st.sets(st.sampled_from(PLACES)) | st.none(),
)
def test_a_merged_store_has_the_parts_of_all(made, manifest, is_right, tree, missing, already):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, without in enumerate(missing):
            made(folder / f"source{number}", without)
        LabelStore.create(folder / "source0", manifest(num_views=3))
        if already is not None:
            made(folder / "target", already)
        sources = [folder / f"source{number}" for number in range(len(missing))]
        before = [tree(source) for source in sources]
        said = []
        united = merge(sources, folder / "target", said.append)
        absent = set.intersection(*map(set, missing), set(PLACES) if already is None else already)
        assert united.manifest.num_views == 3
        assert {place for place in united.missing_parts() if place[0] < 2} == absent
        is_right(united)
        assert united.verify() == [] and [tree(source) for source in sources] == before
        assert len(said) == len((set(PLACES) if already is None else already) - absent)
        after = tree(folder / "target")
        merge(sources, folder / "target")
        assert tree(folder / "target") == after


def test_parts_that_differ_are_refused_before_anything_is_written(made, records, tmp_path):
    made(tmp_path / "a", without=[(1, 3)])
    made(tmp_path / "b", without=[(0, 0), (1, 4)])
    other = LabelStore.open(tmp_path / "b")
    other.part_path(1, 2).unlink()
    rows = records(other.layout, 1, np.arange(16, 24))
    rows["pixels"][5] += 1
    other.seal(1, 2, rows)
    assert other.verify() == []
    name = "view-00001/part-00002.bin"
    with pytest.raises(DataError, match=rf"/a/{name} and .*/b/{name}"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "target")
    assert LabelStore.open(tmp_path / "target").status().sealed == 0
    # Also when one of the two is in the target already.
    with pytest.raises(DataError, match=rf"/a/{name} and .*/b/{name}"):
        merge([tmp_path / "b"], tmp_path / "a")
    assert LabelStore.open(tmp_path / "a").status().sealed == 9


@pytest.mark.parametrize("change", ["identity", "part_size", "layout"])
def test_stores_of_other_labels_are_not_merged(made, manifest, layout, tmp_path, change):
    made(tmp_path / "a")
    value = {"identity": {"teacher": "another"}, "part_size": 9, "layout": layout(2)}[change]
    LabelStore.create(tmp_path / "b", manifest(**{change: value}))
    with pytest.raises(DataError) as caught:
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "target")
    assert caught.value.field == "from" and not (tmp_path / "target").exists()


@pytest.mark.parametrize("tool", ["merge", "prune"])
def test_a_damaged_part_is_not_copied(made, layout, tmp_path, tool):
    made(tmp_path / "a", without=[(1, 3)])
    path = made(tmp_path / "b").part_path(1, 3)
    path.write_bytes(bytes(3) + path.read_bytes()[3:])
    with pytest.raises(DataError, match=re.escape(f"{path} is damaged")):
        if tool == "merge":
            merge([tmp_path / "a", tmp_path / "b"], tmp_path / "target")
        else:
            prune(tmp_path / "b", tmp_path / "target", encoding=layout(1).logits)
    target = LabelStore.open(tmp_path / "target")
    assert not target.is_sealed(1, 3) and target.verify() == []


# -- prune ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=8)
@given(
    views=st.integers(1, 2),
    k=st.integers(1, 3),
    without=st.sets(st.sampled_from(PLACES), max_size=4),
)
def test_a_pruned_store_holds_the_same_in_less(made, manifest, layout, records, views, k, without):
    with tempfile.TemporaryDirectory() as name:
        source = made(Path(name) / "source", without)
        how = {"num_views": views, "encoding": layout(k).logits}
        if layout(k).record_bytes * views >= source.layout.record_bytes * 2:
            with pytest.raises(ConfigError, match="smaller"):
                prune(source.path, Path(name) / "target", **how)
            return
        pruned = prune(source.path, Path(name) / "target", **how)
        assert pruned.manifest.identity == source.manifest.identity and pruned.layout == layout(k)
        assert pruned.manifest.num_views == views and pruned.manifest.num_samples == 37
        assert set(pruned.missing_parts()) == {place for place in without if place[0] < views}
        assert pruned.verify() == []
        for view in range(views):
            found, present = pruned.read(np.full(37, view), np.arange(37))
            expected = source.layout.convert(
                records(source.layout, view, np.arange(37)), layout(k).logits
            )
            np.testing.assert_array_equal(found[present], expected[present])


def test_a_pruned_store_gets_what_its_source_gets(made, records, layout, tmp_path, tree):
    source = made(tmp_path / "source", without=[(0, 1)], about={"versions": {"torch": "2.6"}})
    said = []
    pruned = prune(source.path, tmp_path / "target", encoding=layout(2).logits, say=said.append)
    was = {"num_views": 2, "layout": source.layout.to_json()}
    assert pruned.manifest.about == {"versions": {"torch": "2.6"}, "pruned_from": was}
    before = tree(pruned.path)
    source.seal(0, 1, records(source.layout, 0, np.arange(8, 16)))
    prune(source.path, tmp_path / "target", encoding=layout(2).logits, say=said.append)
    assert len(said) == 10 and before.items() < tree(pruned.path).items()
    assert pruned.records(0, [9]).pixels.tolist() == [9] and pruned.verify() == []


def test_what_cannot_be_pruned_is_refused_before_anything_is_written(made, layout, tmp_path):
    made(tmp_path / "source")
    for wrong in ({}, {"num_views": 3}, {"num_views": 0}, {"encoding": layout(4).logits}):
        with pytest.raises(ConfigError):
            prune(tmp_path / "source", tmp_path / "target", **wrong)
        assert not (tmp_path / "target").exists()
    made(tmp_path / "other", identity={"teacher": "another"})
    with pytest.raises(DataError):
        prune(tmp_path / "source", tmp_path / "other", encoding=layout(2).logits)
