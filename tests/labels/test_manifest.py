"""The manifest of a label store: what is compared, and what is refused."""

import pytest

from vitdistill.errors import DataError
from vitdistill.labels.layout import Layout
from vitdistill.labels.manifest import Manifest, read_store_manifest
from vitdistill.labels.store import LabelStore
from vitdistill.storage.atomic import staged_dir
from vitdistill.storage.manifest import write_manifest

CHANGES = {
    "teacher.weights": ("sha256 4567", '"sha256 0123"', '"sha256 4567"'),
    "data.classes": (["rose", "lily"], '["lily", "rose"]', '["rose", "lily"]'),
    "mixed": (0, "false", "0"),
    "erasing": (0.25, "absent", "0.25"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_each_key_of_the_identity_is_compared(manifest, tmp_path, tree, key):
    value, theirs, ours = CHANGES[key]
    store = LabelStore.create(tmp_path / "s", manifest())
    before = tree(tmp_path)
    wanted = manifest(identity={**manifest().identity, key: value})
    assert wanted.digest != store.manifest.digest
    assert store.manifest.differences(wanted, "there", "here") == (
        f"{key} is {theirs} there and {ours} here"
    )
    with pytest.raises(DataError, match=key):
        LabelStore.create(tmp_path / "s", wanted)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("field", ["num_samples", "part_size", "layout"])
def test_sizes_and_layout_are_compared(manifest, layout, field):
    wanted = manifest(**{field: layout(4) if field == "layout" else 17})
    assert wanted.digest != manifest().digest
    different = manifest().differences(wanted, "there", "here")
    assert different and ";" not in different


def test_equal_manifests_have_one_digest(manifest):
    first = manifest(about={"versions": {"torch": "2.6"}})
    # The order of keys, tuples for lists, the number of views and what is told make no difference.
    identity = {**dict(reversed(manifest().identity.items())), "augment.crop": (0.08, 1.0)}
    assert manifest(identity=identity, num_views=4).digest == first.digest
    assert first.digest == "3c59a9948dca7290fe8fc302d5e2f830a6e1ace04a82862f30d57810e65378ea"
    for name in ("num_samples", "num_views", "part_size"):
        with pytest.raises(ValueError):
            manifest(**{name: 0})


def test_damaged_and_later_manifests_are_refused(made, manifest, tmp_path):
    path = made(tmp_path / "s").path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"37", b"38"))
    with pytest.raises(DataError, match=r"manifest.json"):
        read_store_manifest(path.parent)

    def read(name: str, content: dict) -> Manifest:
        with staged_dir(tmp_path / name) as temp:
            write_manifest(temp, {}, content)
        return read_store_manifest(tmp_path / name)

    layout = Layout(hidden=((0, 2, 3),), features=(2, 3), hidden_dtype="float32")
    written = manifest(layout=layout, about={"teacher": "conv"})
    plain = written.to_json()
    assert read("good", plain) == written
    without = {name: value for name, value in plain.items() if name != "identity"}
    wrong = [{"format": 2}, {"num_samples": 0}, {"num_samples": "7"}, {"layout": {}}]
    wrong += [{"layout": "logits"}, {"layout": {**plain["layout"], "hidden": [[1]]}}]
    wrong += [{"layout": {**plain["layout"], "features": 5}}, {"num_views": 2.5}, {"identity": []}]
    wrong += [{"about": "x"}, {"layout": {**plain["layout"], "hidden": [[0, "2", 3]]}}]
    for number, content in enumerate(
        [*({**plain, **change} for change in wrong), without, {"kind": "checkpoint"}]
    ):
        with pytest.raises(DataError):
            read(str(number), content)
